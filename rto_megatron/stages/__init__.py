"""sft, dpo, reward, rto, generate, evaluate, convert: each reads like its algorithm."""
