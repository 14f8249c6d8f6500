"""PPO of stable-baselines3 on gymnasium's FrozenLake, whose steps are a table of probabilities."""

import argparse

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=64, help="steps in the environment")
args = parser.parse_args()

env = gym.make("FrozenLake-v1", map_name="4x4", is_slippery=True)
model = PPO(
    "MlpPolicy",
    env,
    n_steps=32,
    batch_size=16,
    n_epochs=2,
    learning_rate=1e-3,
    ent_coef=0.01,
    policy_kwargs={"net_arch": [16]},
    seed=0,
    device="cpu",
)
model.learn(total_timesteps=args.steps)
mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=3)
print(f"mean reward {mean:.2f} +/- {std:.2f}")
