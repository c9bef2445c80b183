"""Model families. Einsum letters everywhere: B batch, T query length, S key length, N heads, H head dim, D model dim,
F feed-forward dim, V vocabulary, L layers, I images, P patches, Q resampler queries."""
