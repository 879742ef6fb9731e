import json

from madgen.demo.train import main


def test_training_makes_a_pipeline_that_madgen_loads(tmp_path):
    """Two steps of each part: the pictures are noise, the folder is whole."""
    import torch

    from madgen import PanoramaSampler

    main([str(tmp_path), "--scenes", "48", "--vae-steps", "2", "--unet-steps", "2", "--device", "cpu"])
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    sampler = PanoramaSampler.from_pretrained(str(tmp_path), mad_steps=1, dtype="float32")
    latents = sampler.sample(
        ["dunes"], height=128, width=256, num_inference_steps=1, seeds=[0], guidance_scale=3.0, output="latent"
    )
    assert latents.shape == (1, 4, 16, 32)
    assert torch.isfinite(latents).all()
