"""Joint diffusion over views of one canvas; independent of models, jobs and files.

Letters in names: B prompts, N = B or 2B paths (with classifier-free guidance), V views, C channels, H W canvas,
h w view, L tokens, D width. All positions and sizes are latent cells.
"""
