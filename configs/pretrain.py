"""One stage of continued pre-training on a domain's unlabelled text: `configs/pretrain.py:ARCH-SIZE` (or just ARCH)."""

from ml_collections import ConfigDict

from configs import domain


def get_config(arg: str = "t5-tiny") -> ConfigDict:
  """Returns the config: the `continued` stage of configs/domain.py, to be run by `argot train`.

  Args:
    arg: architecture and size, such as "gpt-tiny"; a bare architecture means its tiny size.

  Raises:
    ValueError: not an architecture and a size.
  """
  config = domain.get_config(arg if "-" in arg else f"{arg}-tiny")
  continued = config.stages.continued.to_dict()
  with config.unlocked():
    config.data.mixture = ConfigDict(continued["data"]["mixture"])
    config.train.update(continued["train"])
    config.stages = ConfigDict()
  return config.lock()
