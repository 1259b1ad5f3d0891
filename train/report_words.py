"""The report page's names of metrics, its headings, and the note under each."""

METRICS = {
  "perplexity": "perplexity, lower better",
  "rougeL": "ROUGE-L F1",
  "rouge1": "ROUGE-1 F1",
  "rouge2": "ROUGE-2 F1",
  "bleu": "BLEU",
  "chrf": "chrF",
  "macro_f1": "macro-F1",
  "micro_f1": "micro-F1",
  "subset_accuracy": "sets that are right",
  "hamming_loss": "Hamming loss, lower better",
  "token_f1": "token F1",
  "repetition_rate": "repetition rate, lower better",
}
TITLES = {
  "matrix": "What each stage can do",
  "retention": "What is left of the best before",
  "changes": "Gained and forgotten",
  "arms": "The arms against the one model",
  "sweeps": "How much to replay, how far to average",
  "course": "Every skill along the main line",
  "bars": "Every task, stage by stage",
  "metrics": "Every metric",
  "losses": "Training loss",
  "validation": "Every task while it was trained",
  "gradients": "Whose gradient it is",
  "samples": "Side by side",
  "calibrations": "How far to trust a label",
  "confusions": "Which labels are confused",
  "sets": "Label by label, where a text has several",
  "mixture": "What each stage read",
  "facts": "The stages in figures",
}
# What a verdict is called where an arm is compared with the one model.
AGAINST = {"gained": "better", "forgotten": "worse", "kept": "level"}
_KEY = '<span class="key" style="{}"></span>'
NOTES = {
  "matrix": "On the test split. Bold: the best stage at a skill. Stronger colour: better in its column. Small: the "
  "95 % bootstrap interval over test rows (of a text: its packed rows).",
  "retention": "Each stage's value by the best that the stages before it reached (of a perplexity: the best by the "
  "value). Backward transfer: the mean over the skills learned before a stage of the value now minus right after they "
  "were learned (Lopez-Paz and Ranzato 2017); below 0 they were forgotten.",
  "changes": "Each stage against those it comes from, on the same n rows: difference, its 95 % paired bootstrap "
  "interval, and p of a paired permutation test, not corrected for the number of comparisons. Kept: the interval lies "
  "within 2 %. Gained or forgotten: it excludes 0, and p is below 0.05. Else the rows cannot tell.",
  "arms": "The same tests, against the main line's last stage.",
  "bars": f"{_KEY.format('background:var(--s1)')}main line{_KEY.format('background:var(--s2)')}comparison arm"
  f"{_KEY.format('border:1px solid')}baseline without a language model",
  "sweeps": "Each point is a model. Replay: multitask again, with that share of its examples from other texts. "
  "Averaging: no training, that share of multitask's parameters and the rest another stage's (WiSE-FT, Wortsman et al. "
  "2022). Bars: the 95 % interval. Dashed: multitask as it is.",
  "course": "At the end of each stage, on the test split, with the 95 % interval; a dashed line where a stage ends.",
  "losses": "Each stage's loss is over its own texts: compare the shapes of two stages, not their heights. A source's "
  "loss is of what the batch of that step holds of it: of a few examples.",
  "validation": "Each task's headline on its validation split, after so many steps. Dashed: a stage ends. A ring: the "
  "best step of a stage that looks for one, whose parameters are the stage's everywhere else on this page.",
  "gradients": "Each source's share of the gradient in a batch: the norm of its own by the sum of all sources' norms. "
  "Which of them pull in opposite directions it does not say; their cosines are in metrics.jsonl.",
  "samples": "The first rows of the test split, not picked by hand, and what each stage answers.",
  "metrics": "Shares from 0 to 1; of a text as long as it should be the length ratio is 1. Repetition: 4-grams that "
  "stood in the answer before. Copy: 3-grams that stand in the input. Valid: free answers that are a label. ECE: the "
  "expected calibration error of the labels' probabilities. Where beams are given, answers were the best of "
  "so many; where candidates are, the draw that the others bear out most.",
  "calibrations": "Left: how often labels are right, by the probability they were given; on the diagonal they mean "
  "what they say. Right: accuracy if only the surest share of texts is labelled.",
  "confusions": "Rows: the right label. Columns: the model's. Outlined: right. Shading: share of the row.",
  "sets": "A label is chosen where its probability, that of all sets that hold it, reaches its threshold, "
  "fitted for F1 on the validation split. Micro-F1 is of all decisions, macro-F1 the mean of the labels'.",
  "mixture": "Asked and drawn are shares of examples, target share of the tokens that the loss counts. "
  "One pass is once over all of a source.",
  "facts": "Tokens are all in the decoder's rows but padding, prompts too; their rate is over the stage's whole time.",
}
