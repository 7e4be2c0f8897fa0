"""The backbone f_θ(z, α, K): `backbone`, its `attention` and `rope`, and what its parameters are (`params`)."""
