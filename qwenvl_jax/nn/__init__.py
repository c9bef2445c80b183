"""Building blocks shared by all models: linear maps, norms, rotary positions, attention, the KV cache."""
