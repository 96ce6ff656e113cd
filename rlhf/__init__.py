"""RLHF by PPO on a reward model of train.py: `python -m rlhf.ppo`."""
