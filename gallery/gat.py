"""A graph attention network (GAT) of torch_geometric: node classification on a random graph."""

import argparse

import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.nn import GATConv
from torch_geometric.utils import erdos_renyi_graph

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=5)
args = parser.parse_args()


class GAT(torch.nn.Module):
    def __init__(self, in_channels, hidden, classes):
        super().__init__()
        self.conv1 = GATConv(in_channels, hidden, heads=4, dropout=0.2)
        self.conv2 = GATConv(4 * hidden, classes, heads=1, concat=False, dropout=0.2)

    def forward(self, x, edge_index):
        x = F.dropout(x, p=0.2, training=self.training)
        x = F.elu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.2, training=self.training)
        return self.conv2(x, edge_index)


torch.manual_seed(0)
graph = Data(
    x=torch.randn(60, 12),
    edge_index=erdos_renyi_graph(60, 0.1),
    y=torch.randint(4, (60,)),
    train_mask=torch.rand(60) < 0.6,
)
model = GAT(12, 8, 4)
optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4)

for step in range(args.steps):
    model.train()
    optimizer.zero_grad()
    out = model(graph.x, graph.edge_index)
    loss = F.cross_entropy(out[graph.train_mask], graph.y[graph.train_mask])
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")

model.eval()
with torch.no_grad():
    correct = (model(graph.x, graph.edge_index).argmax(1) == graph.y)[~graph.train_mask].sum()
print(f"{int(correct)} right")
