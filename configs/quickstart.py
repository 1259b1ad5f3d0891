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
  config.tokenizer.path, config.tokenizer.vocab_size = "train", 1536
  config.model.scan_unroll = 4  # no loop over the layers: faster on a CPU
  config.data.loss_normalisation = "example"  # a label weighs as much as a plan; its 2 tokens would get 4 % of the loss
  config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adafactor", 3e-2, 0.0
  config.optimizer.warmup_steps, config.optimizer.final_fraction = 30, 0.0
  config.cpu_devices = 2
  config.evaluate.batch_size, config.evaluate.max_new_tokens, config.evaluate.corpus_tokens = 64, 80, 10_000
  data = config.data
  if arg == "t5":
    data.objective, data.encoder_length, data.decoder_length, data.batch_size = "span_corruption", 192, 120, 8
    # Longer and more spans than T5's: notes are short, a step teaches more, filling in clauses prepares for writing.
    data.noise_density, data.mean_span_length = 0.5, 8.0
    steps = {"base": 60, "continued": 300, "multitask": 230}
  else:
    data.objective, data.decoder_length, data.batch_size = "next_token", 240, 8
    steps = {"base": 50, "continued": 220, "multitask": 460}
  config.arms.only_steps = 80 if arg == "t5" else 60  # enough to learn the one and lose the other
  mixtures = {
    "base": {"general": 1.0},
    "continued": {"domain": 0.95, "general": 0.05},
    "multitask": {"urgency": 0.56, "instructions": 0.40, "domain": 0.04},
  }
  with config.unlocked():
    for name, mixture in mixtures.items():
      config.stages[name] = ConfigDict({"train": {"steps": steps[name]}, "data": {"mixture": mixture}})
    config.stages.multitask.optimizer = {"learning_rate": 2e-2}  # gentler: keeps more of what the stages before taught
  return config.lock()
