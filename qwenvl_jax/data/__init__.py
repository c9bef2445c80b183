"""Training data: pictures this project draws itself, records of other formats, and the pipeline that batches them."""
