"""Token Maturation (arXiv:2601.04854) in JAX: a language model that predicts vectors and commits tokens late."""
