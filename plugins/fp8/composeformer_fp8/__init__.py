"""FP8 and other scaled number formats: precision policies, the codecs of their checkpoints, kernels."""
