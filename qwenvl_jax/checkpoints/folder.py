"""A checkpoint folder apart from its weights: finding it by name, its small files, and writing one all or nothing."""
