"""CUDA graphs without a GPU: the recorder calls the captured function again on the graph's tensors."""

from madgen.backbones.acceleration.cuda_graphs import Graphs

RUN = {"height": 32, "num_inference_steps": 6, "guidance_scale": 3.0, "output": "latent"}


class Recorder:
    """Replays like a CUDA graph: calls the function again on the same tensors, into the same output."""

    def __init__(self):
        self.captured = self.replayed = self.forgotten = 0

    def __call__(self, run):
        self.captured += 1
        output = run().clone()

        def replay():
            self.replayed += 1
            output.copy_(run())

        output.fill_(float("nan"))  # a capture computes nothing
        return replay, output

    def forget(self):
        self.forgotten += 1


def with_graphs(sampler, recorder):
    sampler.backbone.graphs = Graphs(recorder)
    return sampler
