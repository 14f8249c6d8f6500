"""Recurrent layers and cells: LSTM, GRU and RNN as expressions of operators of the table.

A layer multiplies its whole input by the weights of the input first, by one `linear`; each step then adds
the product of the hidden state. The other steps are those of a cell. All are rounded. The same holds for
packed sequences, whose batches differ in size, and on every device.

The functions are named like PyTorch's operators, whose overloads are called `input` and `data` (packed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from reproml.arithmetic.operators import recurrent_steps
from reproml.arithmetic.operators.arguments import require
from reproml.arithmetic.operators.composites import linear, matmul
from reproml.arithmetic.operators.recurrent_steps import Cell as CompiledCell
from reproml.arithmetic.operators.recurrent_steps import Values


class Weights(NamedTuple):
    """The parameters of one layer in one direction."""

    of_input: Tensor
    of_hidden: Tensor
    input_bias: Optional[Tensor] = None
    hidden_bias: Optional[Tensor] = None
    projection: Optional[Tensor] = None  # of an LSTM's output


# A hidden state is a tuple of tensors [batch, n]: (h,), or (h, c) of an LSTM.
Hidden = tuple[Tensor, ...]
# The product of a step's input and its weights, which a cell takes when it needs it: the order of the
# products determines that of the gradients' sums.
OfInput = Callable[[], Tensor]
Cell = Callable[[OfInput, Hidden, Weights], Hidden]

# ---- cells -------------------------------------------------------------------------------------------


def _lstm_values(x: Tensor, z: Tensor, h: Tensor, c: Any) -> Values:
    """i, f, o: sigmoid; g: tanh of the sums; c' = f c + i g; h' = o tanh(c')."""
    gates = z + x
    parts = gates.unsafe_chunk(4, 1)
    i, f, g, o = parts[0].sigmoid_(), parts[1].sigmoid_(), parts[2].tanh_(), parts[3].sigmoid_()
    new_c = (f * c).add_(i * g)
    kept = new_c.tanh()
    return Values(o * kept, new_c, gates, kept)


def _gru_step(x: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """r, u: sigmoid of the sums; n = tanh(x_n + r z_n); h' = (h - n) u + n. Returns h', r, u, n, z_n."""
    of_x, of_h = x.unsafe_chunk(3, 1), z.unsafe_chunk(3, 1)
    r = (of_h[0] + of_x[0]).sigmoid_()
    u = (of_h[1] + of_x[1]).sigmoid_()
    n = (of_x[2] + of_h[2] * r).tanh_()
    return (h - n).mul_(u).add_(n), r, u, n, of_h[2]


def _gru_values(x: Tensor, z: Tensor, h: Tensor, c: Any) -> Values:
    new_h, r, u, n, kept = _gru_step(x, z, h)
    return Values(new_h, h - n, torch.cat([r, u, n], 1), kept)


def _tanh_values(x: Tensor, z: Tensor, h: Tensor, c: Any) -> Values:
    return Values((z + x).tanh())


def _relu_values(x: Tensor, z: Tensor, h: Tensor, c: Any) -> Values:
    return Values((z + x).relu())


LSTM = CompiledCell(0, 4, _lstm_values, recurrent_steps.lstm_gradients)
GRU = CompiledCell(1, 3, _gru_values, recurrent_steps.gru_gradients)
RNN_TANH = CompiledCell(2, 1, _tanh_values, recurrent_steps.tanh_gradients)
RNN_RELU = CompiledCell(3, 1, _relu_values, recurrent_steps.relu_gradients)


def _products(of_input: OfInput, hidden: Hidden, w: Weights) -> tuple[Tensor, Tensor]:
    z = linear(hidden[0], w.of_hidden, w.hidden_bias)
    return of_input(), z


def _lstm(of_input: OfInput, hidden: Hidden, w: Weights) -> Hidden:
    x, z = _products(of_input, hidden, w)
    new = recurrent_steps.step(LSTM, x, z, *hidden)
    h, c = new if new else _lstm_values(x, z, *hidden)[:2]
    return (h if w.projection is None else matmul(h, w.projection.t())), c


def _gru(of_input: OfInput, hidden: Hidden, w: Weights) -> Hidden:
    x, z = _products(of_input, hidden, w)
    return recurrent_steps.step(GRU, x, z, hidden[0], None) or _gru_step(x, z, hidden[0])[:1]


def _rnn(compiled: CompiledCell) -> Cell:
    def cell(of_input: OfInput, hidden: Hidden, w: Weights) -> Hidden:
        x, z = _products(of_input, hidden, w)
        new = recurrent_steps.step(compiled, x, z, hidden[0], None)
        return new or (compiled.values(x, z, hidden[0], None).h,)

    return cell


_rnn_tanh, _rnn_relu = _rnn(RNN_TANH), _rnn(RNN_RELU)


def _cell(cell: Cell) -> Callable[..., Any]:
    """Return the operator that does one step: (input, hidden state, weights and biases) -> hidden state."""

    def operator(x: Tensor, hidden: Any, *weights: Optional[Tensor]) -> Any:
        w = Weights(*weights)  # type: ignore[arg-type]
        state = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        for h in state:
            require(len(h) == len(x), f"a batch of {len(x)} has hidden states for {len(h)}")
        new = cell(lambda: linear(x, w.of_input, w.input_bias), state, w)
        return new[0] if isinstance(hidden, Tensor) else new

    return operator


lstm_cell, gru_cell = _cell(_lstm), _cell(_gru)
rnn_tanh_cell, rnn_relu_cell = _cell(_rnn_tanh), _cell(_rnn_relu)

# ---- layers ------------------------------------------------------------------------------------------


def _over_steps(
    cell: Cell, x: Tensor, hidden: Hidden, w: Weights, reverse: bool
) -> tuple[Tensor, Hidden]:
    """Run a layer over x [steps, batch, n]. Returns its outputs [steps, batch, m] and the last state."""
    products = linear(x, w.of_input, w.input_bias)
    if w.projection is None:
        c = hidden[1] if len(hidden) > 1 else None
        given = products.flip(0) if reverse else products
        found = recurrent_steps.layer(
            COMPILED[cell], given, hidden[0], c, w.of_hidden, w.hidden_bias
        )
        if found:
            return found[0].flip(0) if reverse else found[0], found[1]
    steps = products.unbind(0)
    if not steps:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    outputs = []
    for step in reversed(steps) if reverse else steps:
        hidden = cell(lambda step=step: step, hidden, w)  # type: ignore[misc]
        outputs.append(hidden[0])
    return torch.stack(outputs[::-1] if reverse else outputs, 0), hidden


def _over_packed_steps(sizes: Sequence[int]) -> Callable[..., tuple[Tensor, Hidden]]:
    """Return `_over_steps` for packed sequences x [sum of sizes, n], with the size of each step's batch."""

    def over_steps(
        cell: Cell, x: Tensor, hidden: Hidden, w: Weights, reverse: bool
    ) -> tuple[Tensor, Hidden]:
        steps = linear(x, w.of_input, w.input_bias).split(list(sizes))
        outputs, finished, start = [], [], hidden
        hidden = tuple(h[: sizes[-1 if reverse else 0]] for h in start)
        for step in reversed(steps) if reverse else steps:
            size, before = len(step), len(hidden[0])
            if size > before:  # sequences begin, from their ends
                pairs = zip(hidden, start)
                hidden = tuple(torch.cat([h, s[before:size]]) for h, s in pairs)
            if size < before:  # sequences end
                finished.append(tuple(h[size:] for h in hidden))
                hidden = tuple(h[:size] for h in hidden)
            hidden = cell(lambda step=step: step, hidden, w)  # type: ignore[misc]
            outputs.append(hidden[0])
        last = [hidden, *reversed(finished)]
        return torch.cat(outputs[::-1] if reverse else outputs), tuple(map(torch.cat, zip(*last)))

    return over_steps


def _stack(
    cell: Cell,
    over_steps: Callable[..., tuple[Tensor, Hidden]],
    x: Tensor,
    start: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """Run all layers. start: the states [layers * directions, batch, n].

    Returns the outputs of the last layer, then the last states.
    """
    directions = 2 if bidirectional else 1
    count = len(parameters) // (layers * directions)
    sizes = [4 if has_biases else 2]  # numbers of parameters of a layer in a direction
    sizes += [sizes[0] + 1] * (cell is _lstm)
    require(
        any(len(parameters) == size * layers * directions for size in sizes),
        f"{len(parameters)} parameters do not fit {layers} layers in {directions} directions",
    )
    for s in start:
        require(
            len(s) == layers * directions,
            f"{layers} layers in {directions} directions take as many hidden states, not {len(s)}",
        )
    states = list(zip(*[s.unbind(0) for s in start]))
    last = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            given: list[Any] = list(parameters[count * i : count * (i + 1)])
            w = Weights(*(given if has_biases else [*given[:2], None, None, *given[2:]]))
            y, hidden = over_steps(cell, x, states[i], w, direction == 1)
            outputs.append(y)
            last.append(hidden)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    return (x, *[torch.stack(s, 0) for s in zip(*last)])


def layers_of(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """Return the operator `input` of a cell: (x, states, parameters, *options, batch_first)."""

    def operator(x: Tensor, start: Any, parameters: Any, *options: Any) -> tuple[Tensor, ...]:
        *rest, batch_first = options
        start = [start] if isinstance(start, Tensor) else start
        x = x.transpose(0, 1) if batch_first else x
        y, *last = _stack(cell, _over_steps, x, start, parameters, *rest)
        return (y.transpose(0, 1) if batch_first else y, *last)

    return operator


def packed_layers_of(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """Return the operator `data` of a cell: (x, sizes of the batches, states, parameters, *options)."""

    def operator(
        x: Tensor, sizes: Tensor, start: Any, parameters: Any, *options: Any
    ) -> tuple[Tensor, ...]:
        start = [start] if isinstance(start, Tensor) else start
        return _stack(cell, _over_packed_steps(sizes.tolist()), x, start, parameters, *options)

    return operator


COMPILED = {_lstm: LSTM, _gru: GRU, _rnn_tanh: RNN_TANH, _rnn_relu: RNN_RELU}
CELLS: dict[str, Cell] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu}
