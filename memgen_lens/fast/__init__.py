"""The parameters of a HookedTransformer, run without hook points: all that training, recording and sweeps are fast by.

The numbers are TransformerLens' own to rounding, and whatever this does not cover is left to TransformerLens' forward
(`support`). Does not know tasks, pairs or steering.
"""
