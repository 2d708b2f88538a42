"""What the commands do that is not training."""

from __future__ import annotations

from pathlib import Path

import yaml

from estune.checkpoint import Checkpoint, locate
from estune.config import Config, load, merge, parse
from estune.journal import FILE, Journal
from estune.run import default_path, find_checkpoint


def evaluate_model(
    model: str, file: Path | None = None, overrides: list[str] | None = None, output: Path | None = None
) -> dict[str, float]:
    """Metrics of a run's best checkpoint, or of a model, on the held-out set.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        file, overrides: settings, on top of the run's.
        output: where to write the completions, as parquet.
    """
    from estune.evaluation import evaluation_metrics, grade_completions, write_completions
    from estune.setup import load_model, make_sampling

    config = _settings_for(model, file, overrides or [])
    checkpoint = find_checkpoint(model)
    task = config.task.build(config.seed)
    loaded = load_model(config.model_copy(update={"model": str(checkpoint), "weights": "inplace"}))
    try:
        ids = loaded.engine.encode([row["prompt"] for row in task.evaluation])
        graded = grade_completions(task, task.evaluation, loaded.pool.generate(ids, make_sampling(config)))
    finally:
        loaded.pool.close()
    if output is not None:
        write_completions(output, graded.records())
    return evaluation_metrics(task, graded)


def describe(config: Config) -> str:
    """What `estune train` would do with these settings: checks model and data, trains nothing."""
    checkpoint = Checkpoint(locate(config.model))
    elements = sum(t.elements for t in checkpoint.tensors.values())
    task = config.task.build(config.seed)
    prompts = min(config.prompts_per_step, len(task.train))
    completions = config.steps * config.population * prompts
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return (
        f"{text}\n"
        f"model {config.model}: {elements:,} parameters in {checkpoint.path}\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows\n"
        f"{config.steps} steps x {config.population} members x {prompts} prompts = {completions:,} completions of at "
        f"most {config.max_new_tokens} tokens\n"
        f"output goes to {config.output_dir or default_path(config)}; nothing has been written"
    )


def _settings_for(model: str, file: Path | None, overrides: list[str]) -> Config:
    if not (Path(model) / FILE).is_file():
        return load(file, [f"model={model}", *overrides])
    own = Journal.read(Path(model)).settings
    given = load(file, overrides).model_dump(mode="json", exclude_unset=True) if file or overrides else {}
    return parse(merge(own, given), model)
