"""Every key of an Argot run, its default, its unit and what it means.

Recipes copy this config, change values and return it; unknown keys fail. Sequence lengths, batch sizes and rates are
counted in tokens, rows and shares; keys that are counts of something say of what (`_steps`, `_tokens`, `_seconds`).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  """Returns the full default config, locked.

  Args:
    arg: ignored here; recipes use it to pick a variant (`configs/quickstart.py:t5`).

  Returns:
    A locked `ConfigDict`; recipes change values under the keys below.
  """
  del arg
  config = ConfigDict()
  config.seed = 0  # one seed for parameters, order of examples, noise and dropout
  config.architecture = "gpt"  # "gpt" (decoder-only) or "t5" (encoder-decoder)
  config.init_from = ""  # weights to start from; "" = from scratch. A run's workdir or one stage in it; a folder in
  # Hugging Face's form (safetensors), or "hf:NAME" of the hub: these bring the model's shape and their tokenizer

  config.model = _model()
  config.lora = _lora()
  config.tokenizer = _tokenizer()
  config.domain = "sample"  # "sample" (the embedded domain) or a domain folder
  config.general = "python"  # general text: "python" (prose every installation carries), a source, "" = none, or
  # the name of one in `sources`, where a split and fields can be chosen
  config.sources = ConfigDict()  # more unlabelled text by name: {"name": source}, see data/sources.py
  config.tasks = ConfigDict()  # more tasks by name: the fields of tasks.json plus {"train": source, "test": source, …}

  config.data = _data()
  config.replay = _replay()
  config.optimizer = _optimizer()
  config.train = _train()
  config.cpu_devices = 0  # devices that JAX makes of a CPU, each with its share of the cores; 0 = JAX's choice: one
  config.mesh = _mesh()
  config.processes = _processes()
  config.evaluate = _evaluate()
  config.stages = stages = ConfigDict()  # recipe: what differs from this config in each stage
  for name in ("base", "continued", "multitask"):
    stages[name] = ConfigDict()  # such as {"train": {"steps": 300}, "data": {"mixture": {"domain": 1.0}}}
  stages.base.update({"data": {"mixture": {"general": 1.0}}})
  stages.continued.update({"data": {"mixture": {"domain": 0.9, "general": 0.1}}})
  stages.multitask.update({"data": {"mixture": {"tasks": 1.0}}})
  config.arms = arms = ConfigDict()  # recipe: comparison arms beside the main line
  arms.only = "one_of_each"  # "all", "none", "one_of_each" (first classification, first generation), or task,task
  arms.only_steps = 0  # optimizer steps of the arms on one task; 0 = as many as multitask
  arms.without_continued = True  # multitask straight from base
  arms.replay = ()  # multitask again with these shares of replayed texts, such as (0.0, 0.05, 0.2)
  arms.replay_mixture = ConfigDict({"domain": 0.5, "general": 0.5})  # … what is replayed: as data.mixture, of texts
  arms.averaging = ()  # no training: this share of multitask's parameters, the rest another stage's: (0.25, 0.5, 0.75)
  arms.averaging_with = "continued"  # … which: "continued" or "base"
  config.retain = ConfigDict()  # recipe: old skills that are measured at every stage, and not trained, by name:
  # {"old": FOLDER}, a domain folder, or an earlier run's workdir for the domain that it was trained on
  config.gate = ConfigDict()  # recipe: rules that the report must meet, else exit code 3, by name: see train/gate.py
  return config.lock()


def _model() -> ConfigDict:
  model = ConfigDict()
  model.size = "tiny"  # a row of SIZES in models/gpt.py or models/t5.py, or "init_from": the shape of those weights
  model.vocab_size = 0  # rows of the embedding, where the weights have more than the tokenizer has tokens; 0 = as many
  model.dtype = "float32"  # of matrix products: "float32" or "bfloat16"
  model.matmul = "default"  # products of the layers' matrices in training's forward pass: "default" is model.dtype;
  # "int8" or "fp8" need the library qwix
  model.storage = "float32"  # of parameters; "bfloat16" halves them, and loses updates that are small beside a weight
  model.dropout = 0.0  # rate, in training only; T5 and GPT-2 drop attention weights, too, which only "xla" does
  model.remat = "none"  # activations kept for the backward pass: a name in REMAT (models/layers.py), or what to keep,
  # of SAVED there, joined by "+"
  model.attention = "auto"  # of whole rows (decoding with a cache: always "xla"): a name in ATTENTION
  # (models/attention.py), or "auto": by platform and by what is asked; what it picks is printed
  model.attention_block = 0  # queries and keys in a block of "splash" (a multiple of 128) or "blockwise" (of 8), one of
  # which "auto" then takes; 0 = the path's own choice
  model.scan_unroll = 1  # layers unrolled per scan iteration; the number of layers = no loop (faster to run on CPU)
  model.overrides = ConfigDict()  # any field of the architecture's config, such as {"layers": 6}
  return model


def _lora() -> ConfigDict:
  lora = ConfigDict()  # low-rank adapters: only they are trained and stored, beside frozen weights
  lora.rank = 0  # 0 = full fine-tuning
  lora.alpha = 16.0  # the adapter's product is multiplied by alpha / rank
  lora.rank_stabilised = False  # … or by alpha / sqrt(rank), so that large ranks learn more than small ones (rsLoRA)
  lora.targets = r"/(query|key|value|out|gate|up|down)$"  # regex: paths of the matrices that get one; these are all
  return lora


def _tokenizer() -> ConfigDict:
  tokenizer = ConfigDict()
  tokenizer.path = "bytes"  # "bytes", a Hugging Face tokenizer folder (or hub name), "train" (the run trains one), or
  # "init_from": that of the weights
  tokenizer.vocab_size = 2048  # of a tokenizer that the recipe trains, sentinels included
  tokenizer.sentinels = 100  # sentinel tokens that a trained tokenizer gets
  return tokenizer


def _data() -> ConfigDict:
  data = ConfigDict()
  data.mixture = ConfigDict()  # name -> share: "general", "domain", a source, a task, "tasks" (all of them), or
  # "replay": text sampled from the checkpoint that the stage starts from, see `replay` below
  # … or a list of shares to go through from the stage's first step to its last: {"general": [0.3, 0.05]}
  data.mixture_unit = "examples"  # what shares count: "examples", or "tokens" (supervised ones; shares of the loss
  # with loss_normalisation "token": by "example" a long text weighs no more than a short one)
  data.task_limit = 0  # "tasks" splits its share by min(examples, limit)^(1/temperature); 0 = no limit
  data.task_temperature = 1.0  # 1 = proportional to examples; larger = more even
  data.objective = "span_corruption"  # of unlabelled text, for either architecture: a name in data/objectives.py
  data.noise_density = 0.15  # share of tokens that span corruption hides
  data.mean_span_length = 3.0  # tokens in a hidden span, on average
  data.encoder_length = 512  # tokens in a row of encoder inputs (t5)
  data.decoder_length = 512  # tokens in a row of decoder targets
  data.batch_size = 16  # rows in a global batch
  data.packing = True  # several examples in a row, kept apart by segment ids
  data.loss_normalisation = "token"  # "token": each target token weighs 1; "example": each example weighs 1; "task":
  # each target token weighs 1 by those of an example of its task or text on average (counted before the stage), so that
  # each has its share of the loss, however long its answers are, and long answers weigh more than short ones within it
  data.bidirectional_prefix = False  # gpt: inputs see each other in both directions
  data.cache_dir = ""  # where tokenised texts are kept, memory-mapped; "" = $ARGOT_CACHE or ~/.cache/argot
  data.bad_rows = "error"  # a row that cannot be read or used: "error" or "skip"; skipped ones are counted by reason
  data.overlong = "error"  # example longer than a row: "error", "skip" or "truncate"; the last two are counted
  return data


def _replay() -> ConfigDict:
  replay = ConfigDict()  # text that a stage samples from its `init_from`, where the mixture has "replay"
  replay.documents = 500
  replay.tokens = 128  # most tokens in a document
  replay.temperature = 1.0  # divides the logits
  replay.top_k = 0  # only the k likeliest tokens are drawn; 0 = all
  replay.top_p = 0.95  # only the likeliest tokens of this probability together are drawn; 1 = all
  return replay


def _optimizer() -> ConfigDict:
  optimizer = ConfigDict()
  optimizer.name = "adamw"  # a name in OPTIMIZERS (train/optimizer.py)
  optimizer.learning_rate = 1e-3  # the schedule's peak
  optimizer.schedule = "cosine"  # a name in SCHEDULES (train/schedules.py)
  optimizer.warmup_steps = 100
  optimizer.initial_fraction = 0.0  # the first rate, as a share of the peak; above 0 to re-warm a trained model
  optimizer.final_fraction = 0.1  # cosine, linear, wsd: the last rate, as a share of the peak
  optimizer.decay_steps = 0  # wsd: steps of the decay at the end
  optimizer.b1 = 0.9  # all but adafactor: first moment, momentum; schedule_free: the average's share in what is trained
  optimizer.b2 = 0.98  # all but adafactor: second moment; lion: momentum
  optimizer.eps = 1e-8  # all but adafactor and lion
  optimizer.weight_decay = 0.01  # matrices only
  optimizer.clip_norm = 1.0  # global gradient norm; 0 = no clipping
  optimizer.moments_dtype = "float32"  # of moments between steps; "bfloat16", or "int8" by blocks; not adafactor's
  optimizer.offload = ""  # where the optimizer's state lies between steps; "" = with the parameters; "pinned_host"
  return optimizer


def _train() -> ConfigDict:
  train = ConfigDict()
  train.steps = 1000  # optimizer steps of this stage
  train.accumulation_steps = 1  # microbatches in a step; the batch size must divide
  train.z_loss = 0.0  # weight of log(Z)^2
  train.label_smoothing = 0.0  # share of each target's probability that is spread over the vocabulary, in training
  train.frozen = ""  # regex: parameters whose path it is found in are not trained, such as "embed/|layers/attention"
  train.loss_chunk_tokens = 512  # tokens whose logits exist at one time on a device
  train.log_every_steps = 20
  train.task_gradients_every_steps = 0  # each task's share of the gradient's norm, and its cosine with the gradient; a
  # record of its own, for the time of one more backward pass and one for each task in the batch; 0 = never
  train.evaluate_every_steps = 0  # each task is measured on its validation split, and after the last step; 0 = never
  train.evaluate_max_examples = 0  # of each task then, from all over the split; 0 = evaluate.max_examples
  train.best_metric = ""  # a task: the step with its best value then is kept, and is what the stage's parameters are:
  # what the next stage starts from, what is evaluated and exported; "" = the last step
  train.checkpoint_every_steps = 200
  train.keep_checkpoints = 2  # newest ones, beside the best
  train.prefetch_batches = 2  # batches made, and laid out on the devices, ahead by a thread
  train.profile_steps = 0  # steps that jax.profiler records into the stage's folder, profile/; 0 = none
  train.profile_first_step = 10  # the first of them, counted from 1
  # A step whose loss or gradient is not finite, or a spike, is skipped: parameters and optimizer stay as they were
  train.spike_factor = 0.0  # a gradient norm above this many times the median of the last 128 is a spike; 0 = none is
  train.max_skipped_steps = 10  # in a row: then the run ends at the last good step (1 or 2: no steps are overlapped)
  train.watchdog_seconds = 1800.0  # a step that takes longer ends the process with all stacks; 0 = no limit. What is
  # not a step (compiling, restoring, saving, measuring a task) may take ten times as long
  train.step = "jit"  # "jit" (any mesh) or "shard_map" (data-parallel, explicit psum)
  return train


def _mesh() -> ConfigDict:
  mesh = ConfigDict()  # sizes; one of them may be -1: the devices that are left
  mesh.data = -1
  mesh.fsdp = 1
  mesh.context = 1  # parts that each row's tokens are split into, for long rows
  mesh.tensor = 1
  mesh.slices = 0  # groups of devices with a slower network between them: TPU slices, GPU nodes. `data` is laid over
  # them and must be a multiple. 0 = what the devices say (TPU slices); GPU nodes: their number
  return mesh


def _processes() -> ConfigDict:
  processes = ConfigDict()  # how the processes of a run on many machines find each other
  processes.coordinator = ""  # "HOST:PORT" of process 0; "" = $ARGOT_COORDINATOR, or what JAX finds: TPU VMs, GKE,
  # SLURM, Open MPI
  processes.count = 0  # how many; 0 = $ARGOT_PROCESSES, or what JAX finds; 1 = do not look for others
  processes.index = -1  # of this one; -1 = $ARGOT_PROCESS, or what JAX finds
  processes.initialization_timeout_seconds = 300  # that a process waits for the others at the start
  processes.heartbeat_timeout_seconds = 100  # without a sign of life after which a process counts as dead
  return processes


def _evaluate() -> ConfigDict:
  evaluate = ConfigDict()
  evaluate.batch_size = 32  # rows
  evaluate.max_examples = 0  # of each task, from all over the file, the same at every stage; 0 = all
  evaluate.max_new_tokens = 128  # longest generated answer
  evaluate.beams = 1  # of a generation task's answers: 1 = greedy; more = the best of so many, at their cost
  evaluate.length_penalty = 1.0  # … which are ranked by log-probability / length^this: more favours longer answers
  evaluate.repetition_penalty = 1.0  # above 1: less of what the decoder has read or written, see models/decode.py
  evaluate.candidates = 1  # more: so many answers are drawn, and the one that the others bear out most by the task's
  # headline is given (minimum Bayes risk), at their cost
  evaluate.temperature = 1.0  # … of those draws
  evaluate.objective = ""  # that perplexity is measured under; "" = data.objective, of a recipe the one of all stages
  evaluate.corpus_tokens = 50_000  # tokens of each held-out text that perplexity is measured on; 0 = all
  evaluate.samples = 6  # sample outputs kept per task for the report
  evaluate.label_score = "sum"  # of log-probabilities; "mean" (a token); "pmi" (less the label's own without an input)
  evaluate.target_accuracy = 0.0  # of the texts that are labelled: the model abstains below a confidence; 0 = never
  return evaluate
