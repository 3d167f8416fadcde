"""The section of the report on the arms of an experiment, over all its seeds."""

from collections.abc import Mapping
from typing import Any

from moe_jax.evaluation.gains import count, percent
from moe_jax.report import names, page
from moe_jax.report.sections import Section

MEASURES = {
    "few_shot": "Few-shot scores on unseen tasks",
    "zero_shot": "Zero-shot scores on unseen tasks",
    "training_tasks": "Scores on the training tasks",
}


def arms(results: Mapping[str, Any]) -> Section:
    """Every arm against every baseline.

    Args:
        results: the value of an experiment's results.json.
    """
    comparisons = {
        measure: {names.named(base): names.comparison(found) for base, found in of_base.items()}
        for measure, of_base in results["comparisons"].items()
    }
    result = Section("arms", "All arms", numbers=comparisons)
    seeds = [str(seed) for seed in results["seeds"]]
    result.table(
        page.texts("arm", "what it is", wide=True),
        [(names.named(arm), what) for arm, what in results["arms"].items()],
    )
    result.explain(
        f"{count(len(seeds), 'model seed')}: {', '.join(seeds)}. Differences are paired by"
        " task and seed; few-shot samples are averaged first. In brackets are 95 % intervals,"
        " a bootstrap over tasks and seeds: where one includes 0, the difference may be"
        " chance. With one seed, what its luck did is not in them."
    )
    for measure, title in MEASURES.items():
        result.add(page.heading(title))
        for baseline, comparison in comparisons.get(measure, {}).items():
            result.add(_table(baseline, comparison))
    for measure in ("few_shot", "zero_shot"):
        for baseline, comparison in comparisons.get(measure, {}).items():
            gain = comparison["arms"].get(names.MIXTURE)
            # Of one seed, the other sections say it already.
            if gain is not None and len(seeds) > 1 and gain["relative"] is not None:
                result.find(
                    f"{MEASURES[measure]}: {names.MIXTURE} against {baseline}"
                    f" {gain['difference']['value']:+.3f}"
                    f"{_range(gain['difference'], '{:+.3f}'.format)}, relative"
                    f" {percent(gain['relative']['value'])}{_range(gain['relative'], percent)},"
                    f" over {count(comparison['tasks'], 'task')} and {count(len(seeds), 'seed')}.",
                    main=baseline == names.DENSE,
                )
    return result


def _table(baseline: str, comparison: Mapping[str, Any]) -> str:
    rows = [[baseline, comparison["score"], None, None, None]]
    for arm, gain in comparison["arms"].items():
        figures = [gain["difference"], gain["relative"], gain["arg"]]
        forms = ["{:+.3f}".format, percent, percent]
        cells = [
            figure and f"{form(figure['value'])}{_range(figure, form)}"
            for figure, form in zip(figures, forms, strict=True)
        ]
        rows.append([arm, gain["score"], *cells])
    return page.table(
        [
            *page.texts("arm"),
            *page.numbers(3, "mean score"),
            *page.texts(f"minus {baseline}", "relative", f"ARG over {baseline}"),
        ],
        rows,
    )


def _range(figure: Mapping[str, Any], form) -> str:
    if figure["interval"] is None:
        return ""
    return f" ({' to '.join(map(form, figure['interval']))})"
