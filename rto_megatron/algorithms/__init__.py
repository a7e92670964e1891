"""The formulas: pure functions of tensors and numbers, without configs or process groups.

Every per-token tensor is `[B, T]` and aligned to tokens: column t is about the token in column t.
A response may lie anywhere in its row; what stands outside the mask never matters, NaN included.
"""
