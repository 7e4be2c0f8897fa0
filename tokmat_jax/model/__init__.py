"""The backbone f_θ(z, α, K): `backbone`, its `attention` and `rope`, and its parameters (`params`)."""
