"""Input data from files: folders and lists of images and arrays, as batches of tensors."""
