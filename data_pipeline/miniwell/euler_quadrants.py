"""euler_multi_quadrants_periodicBC: blocks of gas at different density, pressure and speed, let go at once.

    d_t (rho, rho v, E) + div (rho v, rho v v + p, (E + p) v) = 0,   E = p / (gamma - 1) + rho |v|^2 / 2

At every wall between two blocks starts a Riemann problem, shocks, contacts and fans, and at every corner a
two-dimensional one (Lax and Liu 1998, SIAM J. Sci. Comput. 19); both axes are periodic, so all of them meet. Sweeps of
euler.py with Strang splitting on the unit square. The Well has ten gases between gamma 1.13 and 1.76, here are two of
them, milder: the Well's density and pressure vary about twice as much (0.54 and 0.78, the std in its stats.yaml).
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.miniwell import euler
from data_pipeline.miniwell.system import PERIODIC, ParameterSet, Preset, Simulation, System, counts
from data_pipeline.well.layout import edges

# Half of what one sweep bears: the waves that a jump sends out may be faster than any gas before it, and the step is
# chosen for two sweeps along each axis.
COURANT = 0.45
SMALLEST_BLOCK = 0.2  # width and height, in units of the box
LOWEST, RATIO = 0.4, 4.0  # density and pressure: the lowest of each, and the highest over it
FASTEST = 0.4  # of each velocity component; sound is about 1.2. Faster blocks meet in spikes ten times as dense.


def advance(conserved: np.ndarray, duration: float, spacing: float, gamma: float) -> np.ndarray:
    """Return the state (4, b, X, Y) after `duration`, each trajectory with its own time steps; both axes periodic."""
    conserved = conserved.copy()
    for running, step in euler.double_steps(conserved, duration, spacing, gamma, COURANT):
        ratio, state = (step / spacing)[:, None, None], conserved[:, running]
        for normal in (1, 2, 2, 1):  # symmetric, and so second order in time
            state = _sweep(state, ratio, normal, gamma)
        conserved[:, running] = state
    return conserved


def _sweep(conserved: np.ndarray, ratio: np.ndarray, normal: int, gamma: float) -> np.ndarray:
    """Take a sweep along axis `normal` - 1 of the box, x or y."""
    turned = conserved.swapaxes(-1, -2) if normal == 1 else conserved
    swept, _ = euler.sweep(turned, ratio, normal, periodic=True, gamma=gamma)
    return swept.swapaxes(-1, -2) if normal == 1 else swept


def walls(rng: np.random.Generator) -> np.ndarray:
    """Return two or three places on a circle of length 1, sorted, with gaps of SMALLEST_BLOCK or more."""
    count = int(rng.integers(2, 4))
    spare = rng.dirichlet(np.ones(count)) * (1 - count * SMALLEST_BLOCK)
    return np.sort((rng.uniform() + np.cumsum(spare + SMALLEST_BLOCK)) % 1)


def initial_state(points: np.ndarray, gamma: float, rng: np.random.Generator) -> np.ndarray:
    """Return conserved (4, X, X): 4 to 9 blocks, each of a gas of its own; points (X,) of either axis."""
    walls_x, walls_y = walls(rng), walls(rng)
    shape = (len(walls_x), len(walls_y))
    blocks = np.stack(
        [
            LOWEST * RATIO ** rng.uniform(size=shape),
            *rng.uniform(-FASTEST, FASTEST, (2, *shape)),
            LOWEST * RATIO ** rng.uniform(size=shape),
        ]
    )
    # What lies beyond the last wall is the block before the first: the box is periodic.
    row, column = (np.searchsorted(places, points) % len(places) for places in (walls_x, walls_y))
    return euler.conserved_from_primitive(blocks[:, row[:, None], column[None, :]], gamma)


def simulate(preset: Preset, parameter_set: ParameterSet, rngs: Sequence[np.random.Generator]) -> Simulation:
    """Simulate trajectories of one `gamma`, whose first frame is the blocks themselves; see System.simulate."""
    size, gamma = preset.grid[0], parameter_set.scalars["gamma"]
    points = (np.arange(size) + 0.5) / size
    frames = [np.stack([initial_state(points, gamma, rng) for rng in rngs], axis=1)]
    for _ in range(preset.num_frames - 1):
        frames.append(advance(frames[-1], preset.dt, 1 / size, gamma))
    conserved = np.stack(frames, axis=2)  # (4, b, T, X, Y)
    return Simulation(
        time=preset.times,
        x=points,
        y=points,
        fields={
            "energy": conserved[3],
            "density": conserved[0],
            "pressure": euler.primitive_from_conserved(conserved, gamma)[3],
            "momentum": np.moveaxis(conserved[1:3], 0, -1),
        },
        boundaries=edges(PERIODIC, preset.grid),
    )


def _set(gamma: float, *trajectories: int) -> ParameterSet:
    return ParameterSet(f"gamma_{gamma:g}", {"gamma": gamma}, counts(*trajectories))


SYSTEM = System(
    name="euler_multi_quadrants_periodicBC",
    tensor_orders={"energy": 0, "density": 0, "pressure": 0, "momentum": 1},
    presets={
        "mini": Preset((64, 64), 30, 0.02, (_set(1.4, 3, 1, 4), _set(1.22, 1, 1, 4))),
        "tiny": Preset((32, 32), 9, 0.04, (_set(1.4, 1, 1, 1), _set(1.22, 1, 0, 1))),
    },
    simulate=simulate,
    cost=1.0,
)
