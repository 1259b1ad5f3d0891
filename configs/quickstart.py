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
  config.tokenizer.vocab_size = 1536
  config.model.scan_unroll = 8
  config.data.batch_size = 16
  if arg == "t5":
    config.data.objective, config.data.encoder_length, config.data.decoder_length = "span_corruption", 128, 80
  else:
    config.data.objective, config.data.decoder_length = "next_token", 160
  config.data.loss_normalisation = "example"  # a label weighs as much as a plan; its 2 tokens would get 4 % of the loss
  config.arms.only_steps = 130  # half of multitask's: about as many examples of the task
  config.optimizer.learning_rate = 2e-3
  config.optimizer.weight_decay = 0.1
  config.optimizer.warmup_steps = 30
  config.evaluate.batch_size = 64
  config.evaluate.max_new_tokens = 80
  config.evaluate.corpus_tokens = 20_000
  with config.unlocked():
    config.stages.base = ConfigDict({"train": {"steps": 80}, "data": {"mixture": {"general": 1.0}}})
    config.stages.continued = ConfigDict(
      {"train": {"steps": 260}, "data": {"mixture": {"domain": 0.95, "general": 0.05}}}
    )
    config.stages.multitask = ConfigDict(
      {"train": {"steps": 260}, "data": {"mixture": {"urgency": 0.4, "instructions": 0.5, "domain": 0.1}}}
    )
  return config.lock()
