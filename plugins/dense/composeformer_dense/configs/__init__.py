"""What the dense parts say of themselves: fields, limits, tensors and costs. Nothing here imports torch."""
