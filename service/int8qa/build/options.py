"""What a build and a comparison may be told, and what else to tell a build that fails.

In: choices, each with its default. Out: :class:`BuildOptions` and
:class:`LaboratoryOptions`, checked before anything slow begins. Knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from int8qa.build.accuracy import DEFAULT_GATE
from int8qa.build.calibration import Calibrator
from int8qa.build.checkpoint import demo_checkpoint_directory
from int8qa.build.engines.tensorrt_options import PlanOptions
from int8qa.build.quantization import RECIPES, Recipe, choose_default
from int8qa.build.stored_ranges import read_ranges
from int8qa.build.subject import BUCKET_STEP, PLAN_BUCKET_STEP, QuestionSources
from int8qa.errors import BuildError

ALL_CALIBRATORS = (
    Calibrator("max"),
    Calibrator("percentile", 99.9),
    Calibrator("percentile", 99.99),
    Calibrator("percentile", 99.999),
    Calibrator("percentile", 99.9999),
    Calibrator("mse"),
    Calibrator("entropy"),
    Calibrator("search"),
)
SMOOTHED_CALIBRATORS = ("percentile-99.999", "search")
"""What SmoothQuant is tried with, of those compared: the default and the search."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything a build depends on besides the code and the machine."""

    model_repository: Path = Path("model_repository")
    checkpoint: str = field(default_factory=lambda: str(demo_checkpoint_directory()))
    revision: str | None = None
    recipe: Recipe | None = None
    """None: see :meth:`choose_recipe`."""
    calibrator: Calibrator = field(default_factory=Calibrator)
    keep_trained: bool = field(default=True, compare=False)
    """Ranges that the checkpoint was trained with go before the calibrator's. Not
    compared: of a checkpoint without such ranges it changes nothing."""
    sources: QuestionSources = field(default_factory=QuestionSources)
    smooth: bool = True
    """SmoothQuant before calibration; see smoothing.py."""
    gate: float = DEFAULT_GATE
    mixed: bool = False
    """Leave the most sensitive kernels in float until the gate is reached."""
    plans: PlanOptions | None = None
    """How TensorRT's plans are built; None serves with OpenVINO."""
    force: bool = False
    """Rebuild even if the repository is current."""
    beside: bool = field(default=False, compare=False)
    """Name the models anew, so that a running Triton can load them beside those it
    serves. Not compared: names change nothing."""

    @property
    def target(self) -> str:
        """The engine that serves: openvino, tensorrt or tensorrt-rtx."""
        return "openvino" if self.plans is None else str(self.plans.flavour)

    @property
    def bucket_step(self) -> int:
        """What padded lengths are multiples of, in tokens."""
        return BUCKET_STEP if self.plans is None else PLAN_BUCKET_STEP

    def choose_recipe(self, directory: Path) -> Recipe:
        """The recipe asked for, else the one trained with, else the target's default.

        One trained with counts if its ranges may be kept and its grids suit the target.

        Args:
            directory: of the checkpoint.

        Raises:
            CheckpointError: there are ranges, but damaged or of another format.
        """
        if self.recipe is not None:
            return self.recipe
        stored = read_ranges(directory) if self.keep_trained else None
        default = choose_default(self.target)
        signed = self.plans is not None
        if stored is None or not stored.suits_softmax(signed=signed):
            return default
        return RECIPES.get(stored.recipe, default)

    @property
    def is_default(self) -> bool:
        """Whether nothing was chosen but the place."""
        plain = BuildOptions(model_repository=self.model_repository, force=self.force)
        return self == plain

    def check(self) -> None:
        """Refuse what cannot work before anything slow begins.

        Raises:
            BuildError: the gate is no share, or TensorRT cannot build as asked.
            DataFileError: a file of questions is not there.
        """
        if not 0.0 <= self.gate <= 1.0:
            raise BuildError(
                f"the gate is {self.gate}; allowed: 0 (off) to 1, a share of FP32's F1"
            )
        if self.plans is not None:
            self.plans.check()
        self.sources.check()


@dataclass(frozen=True, slots=True)
class LaboratoryOptions:
    """What a comparison compares, on what."""

    checkpoint: str = field(default_factory=lambda: str(demo_checkpoint_directory()))
    revision: str | None = None
    sources: QuestionSources = field(default_factory=QuestionSources)
    recipes: tuple[Recipe, ...] = tuple(RECIPES.values())
    calibrators: tuple[Calibrator, ...] = ALL_CALIBRATORS
    smooth: bool = True
    """Also with SmoothQuant, by those of ``SMOOTHED_CALIBRATORS`` that are compared."""
    gate: float = DEFAULT_GATE
    sensitivity_questions: int = 100
    """Evenly spaced over the evaluation questions; 0 leaves sensitivity out."""
    cache: Path | None = None
    """Directory of the sensitivity's findings; None: by XDG_CACHE_HOME."""

    @property
    def smoothed_calibrators(self) -> tuple[Calibrator, ...]:
        """What SmoothQuant is tried with; none if it is not."""
        return tuple(
            calibrator
            for calibrator in self.calibrators
            if self.smooth and calibrator.name in SMOOTHED_CALIBRATORS
        )

    def check(self) -> None:
        """Refuse what cannot work before anything slow begins."""
        self.sources.check()
        if not self.recipes or not self.calibrators:
            raise BuildError("nothing to compare: give a recipe and a calibrator")
        if len({recipe.name for recipe in self.recipes}) < len(self.recipes):
            raise BuildError("two recipes have the same name; rename one of them")
        names = [calibrator.name for calibrator in self.calibrators]
        for name in names:
            if names.count(name) > 1:
                raise BuildError(f"the calibrator {name} is given twice; once will do")


def list_advice(options: BuildOptions, recipe: Recipe) -> list[str]:
    """What to try when INT8 loses too much, the most promising first.

    Args:
        options: of the build.
        recipe: see :meth:`BuildOptions.choose_recipe`.
    """
    advice = []
    if recipe.name == "full":
        advice.append("--recipe gemms keeps residual adds in float")
    if recipe.name in {"full", "gemms"}:
        advice.append("--recipe linear keeps attention in float, too")
    if not options.smooth:
        advice.append("--smooth moves outlier channels into the weights")
    if options.calibrator.method != "search":
        advice.append("--calibrator search chooses each range by its logit error")
    if not recipe.per_channel:
        advice.append("--weights per-channel")
    if not options.mixed:
        advice.append("--mixed leaves the most sensitive kernels in float")
    advice.append("calibrate on text of your own (--calibration-data)")
    advice.append("`int8qa sensitivity` shows which tensors cost what")
    return advice
