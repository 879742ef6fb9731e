"""Python callers see madgen's warnings, not those of diffusers and transformers about the same texts and models."""

import logging

from madgen import PanoramaSampler


class Collected(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_loading_and_encoding_log_no_warnings_of_libraries(caplog):
    loggers, collected = [logging.getLogger(name) for name in ("diffusers", "transformers")], Collected()
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.addHandler(collected)
    try:
        sampler = PanoramaSampler.from_pretrained("demo-dit", name="flux", mad_steps=0)
        size = {"height": 128, "width": 128, "num_inference_steps": 1, "guidance_scale": 3.0}
        sampler.sample(["mountains over a wide valley " * 20], seeds=[1], output="latent", **size)
        assert collected.messages == []
        assert [logger.level for logger in loggers] == [logging.WARNING] * 2
        assert len([record for record in caplog.records if "too long for the text encoder" in record.getMessage()]) == 1
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(collected)
            logger.setLevel(level)
