"""The whole recipe on the embedded sample domain, in minutes on two CPU cores: `configs/quickstart.py:t5` or `:gpt`."""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "t5") -> ConfigDict:
  """Returns the config.

  Args:
    arg: "t5" or "gpt".

  Raises:
    ValueError: another architecture.
  """
  if arg not in ("t5", "gpt"):
    raise ValueError(f"configs/quickstart.py:{arg}: known are t5 and gpt")
  config = base.get_config()
  config.architecture = arg
  config.tokenizer.path = "train"
  config.tokenizer.vocab_size = 1280
  config.model.scan_unroll = 8
  config.data.batch_size = 16
  config.data.loss_normalisation = "token"
  if arg == "t5":
    config.data.objective, config.data.encoder_length, config.data.decoder_length = "span_corruption", 256, 128
  else:
    config.data.objective, config.data.decoder_length = "next_token", 256
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 40
  config.evaluate.max_new_tokens = 96
  config.evaluate.corpus_tokens = 20_000
  config.train.log_every_steps = 20
  with config.unlocked():
    config.stages.base = ConfigDict({"train": {"steps": 200}, "data": {"mixture": {"general": 1.0}}})
    config.stages.continued = ConfigDict({"train": {"steps": 400}, "data": {"mixture": {"domain": 0.95, "general": 0.05}}})
    config.stages.multitask = ConfigDict({"train": {"steps": 300}, "data": {"mixture": {"tasks": 1.0}}})
  return config.lock()
