"""The predictor online. So far: `batcher`, which lets requests share forward passes."""
