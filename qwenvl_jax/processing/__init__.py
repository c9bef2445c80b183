"""What turns messages and pictures into model inputs and model text back into words and boxes; no JAX in here."""
