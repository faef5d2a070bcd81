"""What travels to the Hub with the weights: encoder and decoder, image processor, pipeline, sampler, denoiser."""
