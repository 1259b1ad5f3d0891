"""The whole recipe on your own domain folder: `configs/domain.py:ARCH-SIZE --config.domain=FOLDER`.

`ARCH-SIZE` is an architecture and a row of its SIZES: t5-tiny, gpt-tiny, t5-t5-v1.1-small, gpt-gpt2, …; or
`t5-init_from` and `gpt-init_from` with `--config.init_from=WEIGHTS`: then `base` is those weights as they are.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "t5-tiny") -> ConfigDict:
  """Returns the config.

  Args:
    arg: architecture and size, such as "t5-tiny".

  Raises:
    ValueError: not an architecture and a size.
  """
  architecture, _, size = arg.partition("-")
  if architecture not in ("t5", "gpt") or not size:
    raise ValueError(f"configs/domain.py:{arg}: expected t5-SIZE or gpt-SIZE, such as t5-tiny or t5-init_from")
  tiny, given = size.startswith("tiny"), size == "init_from"
  config = base.get_config()
  config.architecture = architecture
  config.model.size = size
  config.tokenizer.path, config.tokenizer.vocab_size = "init_from" if given else "train", 4096
  config.data.overlong = "truncate"
  config.data.loss_normalisation = "example"  # a label of 2 tokens weighs as much as an answer of 60
  config.data.task_limit, config.data.task_temperature = 4000, 2.0
  # T5's rates, pre-training and fine-tuning, for the published sizes; a tiny model bears and needs more.
  learning_rate, multitask_rate = (3e-2, 2e-2) if tiny else (1e-2, 1e-3)
  config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adafactor", learning_rate, 0.0
  config.optimizer.final_fraction = 0.0
  config.evaluate.batch_size = 64
  if architecture == "t5":
    config.data.objective, config.data.encoder_length, config.data.decoder_length = "span_corruption", 256, 128
    config.evaluate.max_new_tokens = 128  # whatever is learned
  else:
    config.data.objective, config.data.decoder_length = "next_token", 320
    config.evaluate.max_new_tokens = 64  # more would leave prompts less of a row
  if tiny:  # for two CPU cores and small data: no loop over the layers, and more of each text to fill in
    config.cpu_devices, config.model.scan_unroll, config.data.batch_size = 2, 4, 12
    config.data.noise_density, config.data.mean_span_length = 0.3, 5.0
  steps = {"base": 0 if given else 100, "continued": 600, "multitask": 700}
  mixtures = {
    "base": {"general": 1.0},
    "continued": {"domain": 0.95, "general": 0.05},
    "multitask": {"tasks": 0.85, "domain": 0.1, "general": 0.05},  # replay of both texts
  }
  config.arms.only_steps = 200  # enough to lose the other skills
  with config.unlocked():
    for name, mixture in mixtures.items():
      config.stages[name] = ConfigDict({"train": {"steps": steps[name]}, "data": {"mixture": mixture}})
    config.stages.base.optimizer = {"warmup_steps": 20}
    config.stages.multitask.optimizer = {"learning_rate": multitask_rate}
  return config.lock()
