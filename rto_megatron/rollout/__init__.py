"""Responses: sampling, the KV-cache engine, scoring, and the experience that PPO learns from."""
