"""What is done with latents: encoding a data set, fitting the sampler, subspaces, groups, retrieval."""
