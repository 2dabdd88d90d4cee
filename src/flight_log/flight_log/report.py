"""A flight as a picture, and as an animation."""

from __future__ import annotations

import io
import math
from pathlib import Path

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib import animation  # noqa: E402
from matplotlib.colors import LightSource, to_rgb  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402
from mpl_toolkits.mplot3d.art3d import Line3DCollection  # noqa: E402

from flight_log import metrics  # noqa: E402
from flight_log.evaluation import Evaluation, tracking  # noqa: E402
from flight_log.flight import Flight, FlightStatus  # noqa: E402
from flight_log.scene import interval, verdict  # noqa: E402
from flight_log.scene import shown as shown_span  # noqa: E402
from flight_log.table import label, remarks  # noqa: E402

INK, MUTED, GRID = '#1f2430', '#6b7280', '#e5e7eb'
AXES = ('#c2410c', '#15803d', '#1d4ed8')  # x, y, z
PHASE_COLOURS = {'taking_off': '#dbeafe', 'holding': '#fef3c7', 'following': '#ecfdf3', 'landing': '#ede9fe',
                 'emergency': '#fecaca'}
SPHERE, NEAREST, FLOWN, PLANNED, GOAL = '#94a3b8', '#dc2626', 'viridis', '#f59e0b', '#16a34a'
STYLE = {'font.size': 9, 'axes.edgecolor': MUTED, 'axes.labelcolor': INK, 'text.color': INK,
         'xtick.color': MUTED, 'ytick.color': MUTED, 'axes.spines.top': False,
         'axes.spines.right': False, 'axes.grid': True,
         'grid.color': GRID, 'grid.linewidth': 0.8, 'axes.titlesize': 9.5, 'axes.titleweight': 'bold',
         'axes.titlelocation': 'left', 'legend.frameon': False, 'legend.fontsize': 8}
ELEVATION, AZIMUTH = 24.0, -58.0  # degrees, of the eye
MAX_PLANS = 6  # horizons drawn
FRAMES = 120  # of an animation at most


def picture(flight: Flight, evaluation: Evaluation) -> bytes:
    """PNG bytes: the path among the spheres, and the trial over time."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(14, 8.6), dpi=110)
        grid = figure.add_gridspec(5, 1, left=0.575, right=0.985, top=0.82, bottom=0.06, hspace=0.36)
        start, end = interval(flight)
        # The path is drawn over the spheres wherever it runs: it is what the picture is about.
        scene = figure.add_axes((-0.01, 0.10, 0.54, 0.78), projection='3d', computed_zorder=False)
        _scene(scene, flight, evaluation, start, end)
        series = [figure.add_subplot(grid[i]) for i in range(5)]
        _time_series(series, flight, evaluation, start, end)
        _heading(figure, evaluation)
        out = io.BytesIO()
        figure.savefig(out, format='png')
        plt.close(figure)
    return out.getvalue()


def _heading(figure, e: Evaluation) -> None:
    said = verdict(e)
    colour = NEAREST if e.failure else {'success': GOAL, 'open loop': '#1d4ed8'}.get(said, '#b45309')
    figure.text(0.02, 0.952, label(e), fontsize=15, fontweight='bold')
    figure.text(0.985, 0.952, said, fontsize=15, fontweight='bold', color=colour, ha='right')
    facts = [f'{e.steps} steps']
    if math.isfinite(e.total_return):
        facts.append(f'return {e.total_return:.1f} ({100 * e.normalised_return:.1f} % of the maximum)')
    if math.isfinite(e.min_clearance):
        facts.append(f'least clearance {e.min_clearance:.3f} m (sphere {e.min_clearance_sphere})')
    if math.isfinite(e.final_max) and not e.failure:
        facts.append(f'last second within {e.final_max:.3f} m of the goal')
    if math.isfinite(e.tracking_rms):
        facts.append(f'tracking {e.tracking_rms:.3f} m RMS')
    facts.append(f'{e.deadline_misses} deadline misses')
    figure.text(0.02, 0.922, '   ·   '.join(facts), fontsize=10, color=MUTED)
    if e.failure:
        figure.text(0.02, 0.897, remarks(e)[0], fontsize=9, color=NEAREST)


# --- the scene ----------------------------------------------------------------------------------

def _scene(ax, flight: Flight, e: Evaluation, start: float, end: float) -> None:
    states = flight.motion
    flown = states.between(start, end)
    before, after = states.between(-math.inf, start), states.between(end, math.inf)
    goal = np.array(e.goal)
    # Moving spheres stand where they were at the closest moment, which is what the picture is about.
    moment = start + e.min_clearance_t if math.isfinite(e.min_clearance_t) else end
    centre, radius = (a[0] for a in flight.spheres.at(np.array([moment])))
    for k in np.argsort(centre @ _camera()):  # the farthest first
        if np.isfinite(centre[k]).all():
            _ball(ax, centre[k], radius[k], NEAREST if k == e.min_clearance_sphere else SPHERE,
                  0.85 if k == e.min_clearance_sphere else 0.4)
    if flight.spheres.moving:
        ax.figure.text(0.02, 0.86, f'spheres as they stood {moment - start:.1f} s after engage', fontsize=9,
                       color=MUTED)
    for other, name in ((before, 'before'), (after, 'after')):
        if len(other.t) > 1 and flight.status:
            ax.plot(*other.position.T, color=MUTED, lw=0.8, ls=(0, (2, 2)), alpha=0.6,
                    label='take-off, way to the start, landing' if name == 'before' else None)
    for n, i in enumerate(_some_plans(flight, flown)):
        ax.plot(*flight.plans.path[i].T, color=PLANNED, lw=1.2, marker='o', ms=3.4, alpha=0.95, zorder=5,
                label='planned horizons' if n == 0 else None)
    if len(flown.t) > 1:
        speed = np.linalg.norm(flown.velocity, axis=1)
        if not np.isfinite(speed).any():
            speed = np.linalg.norm(np.gradient(flown.position, flown.t, axis=0), axis=1)
        pieces = np.stack([flown.position[:-1], flown.position[1:]], axis=1)
        line = Line3DCollection(pieces, cmap=FLOWN, lw=2.6, zorder=6)
        line.set_array(speed[:-1])
        line.set_clim(0.0, max(float(np.nanmax(speed)), 0.1))
        ax.add_collection3d(line)
        strip = ax.figure.add_axes((0.33, 0.048, 0.18, 0.014))
        bar = ax.figure.colorbar(line, cax=strip, orientation='horizontal')
        bar.ax.grid(False)
        bar.ax.set_title('speed (m/s)', loc='left', fontsize=8, fontweight='normal', color=MUTED, pad=3)
        bar.ax.tick_params(length=0, labelsize=8)
        bar.outline.set_visible(False)
        ground = np.full(len(flown.t), 0.0)
        ax.plot(flown.position[:, 0], flown.position[:, 1], ground, color=MUTED, lw=1.2, alpha=0.55, zorder=1,
                label='flown path on the ground')
        ax.scatter(*flown.position[0], s=55, marker='s', color=INK, zorder=8, label='start', depthshade=False)
    ax.scatter(*goal, s=150, marker='*', color=GOAL, edgecolor='white', lw=0.6, zorder=9, label='goal',
               depthshade=False)
    if e.failure and math.isfinite(e.failure.t) and len(flown.t):
        i = int(np.clip(metrics.latest(np.array([start + e.failure.t]), flown.t)[0], 0, None))
        ax.scatter(*flown.position[i], s=110, marker='X', color=NEAREST, edgecolor='white', zorder=10,
                   label=e.failure.cause.replace('_', ' '), depthshade=False)
    _box(ax, np.vstack([flown.position, goal[None], centre[np.isfinite(centre).all(axis=1)].reshape(-1, 3)]))
    ax.figure.legend(*ax.get_legend_handles_labels(), loc='lower left', bbox_to_anchor=(0.02, 0.02), ncol=2)


def _some_plans(flight: Flight, flown) -> np.ndarray:
    """Indices of plans made at equal distances along the flown path."""
    if len(flown.t) < 2:
        return np.zeros(0, dtype=int)
    made = np.flatnonzero((flight.plans.t >= flown.t[0]) & (flight.plans.t <= flown.t[-1]))
    if not len(made):
        return made
    way = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(flown.position, axis=0), axis=1))])
    at = np.interp(flight.plans.t[made], flown.t, way)
    return made[np.unique(np.abs(at[:, None] - np.linspace(0, at[-1], MAX_PLANS)).argmin(axis=0))]


def _camera() -> np.ndarray:
    """Direction from the scene to the eye."""
    e, a = math.radians(ELEVATION), math.radians(AZIMUTH)
    return np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])


def _ball(ax, centre, radius, colour, alpha) -> None:
    u, v = np.mgrid[0:2 * np.pi:14j, 0:np.pi:9j]
    unit = np.stack([np.cos(u) * np.sin(v), np.sin(u) * np.sin(v), np.cos(v)])
    ax.plot_surface(*(centre[:, None, None] + radius * unit), color=to_rgb(colour), alpha=alpha, lw=0,
                    shade=True, zorder=2, lightsource=LightSource(315, 55), rstride=1, cstride=1)


def _box(ax, points) -> None:
    """Equal scales on all axes around `points`."""
    low, high = points.min(axis=0) - 0.1, points.max(axis=0) + 0.1
    low[2] = min(low[2], 0.0)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]),
           xlabel='x (m)', ylabel='y (m)', zlabel='z (m)')
    ax.set_box_aspect(high - low, zoom=1.06)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    ax.view_init(ELEVATION, AZIMUTH)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_pane_color((0.985, 0.985, 0.99, 1.0))
        axis._axinfo['grid'].update(color=GRID, linewidth=0.7)


# --- over time ----------------------------------------------------------------------------------

def _time_series(axes, flight: Flight, e: Evaluation, start: float, end: float) -> None:
    states, (first, last) = flight.motion, shown_span(flight)
    shown = states.between(first, last)
    t = shown.t - start
    position, distance, clear, tracked, timing = axes
    for i, name in enumerate('xyz'):
        position.plot(t, shown.position[:, i], color=AXES[i], lw=1.4, label=name)
        position.axhline(e.goal[i], color=AXES[i], lw=0.8, ls=(0, (4, 3)), alpha=0.7)
    _legend(position)
    position.set(title='position, goal dashed (m)')

    distance.plot(t, np.linalg.norm(shown.position - e.goal, axis=1), color=INK, lw=1.4)
    distance.axhline(0.10, color=GOAL, lw=0.8, ls=(0, (4, 3)))
    distance.set(title='distance to the goal, 0.10 m dashed (m)', yscale='log')
    distance.set_ylim(bottom=max(distance.get_ylim()[0], 5e-3))

    if e.spheres:
        d, _ = metrics.clearance(shown.t, shown.position, flight.spheres)
        clear.plot(t, d, color=INK, lw=1.2)
        clear.axhspan(min(-0.05, float(d.min()) - 0.02), 0.0, color=NEAREST, alpha=0.15, lw=0)
        if math.isfinite(e.min_clearance):
            clear.plot([e.min_clearance_t], [e.min_clearance], 'o', color=NEAREST, ms=5)
            late = e.min_clearance_t > 0.7 * t[-1]
            clear.annotate(f'{e.min_clearance:.3f} m, sphere {e.min_clearance_sphere}',
                           (e.min_clearance_t, e.min_clearance), (-6 if late else 6, 5),
                           textcoords='offset points', ha='right' if late else 'left', color=NEAREST,
                           fontsize=8)
        clear.set(title='clearance to the nearest sphere (m)')
    else:
        _empty(clear, 'clearance', 'no spheres in the bag')

    sent, error = tracking(flight, first, last)
    if len(sent):
        tracked.plot(sent - start, 100 * error, color=AXES[2], lw=1.2)
        tracked.set(title='distance from the setpoint (cm)', ylim=(0, 1.2 * max(100 * np.nanmax(error), 1.0)))
    else:
        _empty(tracked, 'distance from the setpoint', 'no setpoints in the bag')

    ticks = flight.ticks.between(first, last)
    if len(ticks.t):
        timing.plot(ticks.t - start, ticks.latency_ms, '.', ms=3.5, color='#a16207', label='odometry to plan')
        timing.plot(ticks.t - start, ticks.solve_ms, '.', ms=3.5, color='#7c3aed', label='solve')
        refused = [n for n, g in enumerate(ticks.gate) if g and g != 'accepted']
        if refused:
            timing.plot(ticks.t[refused] - start, np.zeros(len(refused)), 'x', ms=5, color=NEAREST,
                        label='plan refused', clip_on=False)
        judged = flight.ticks.between(start, end)
        top = np.nanpercentile(np.concatenate([judged.latency_ms, judged.solve_ms, [1.0]]), 99.5)
        timing.set(title='policy (ms)', ylim=(0, 1.25 * top))
        _legend(timing)
    else:
        _empty(timing, 'policy', 'no policy ticks in the bag')
    timing.set_xlabel('time after engage (s)' if e.mode == 'trial' else 'time (s)')
    for ax in axes:
        ax.set_xlim(t[0], t[-1])
        ax.tick_params(labelbottom=ax is timing, length=0)
        shown_phases = _shade(ax, flight.status, start)
        if e.failure and math.isfinite(e.failure.t):
            ax.axvline(e.failure.t, color=NEAREST, lw=1.0)
    if shown_phases:
        position.figure.legend(
            handles=[Patch(color=PHASE_COLOURS[p], label=p.replace('_', ' ')) for p in shown_phases],
            ncol=len(shown_phases), loc='lower left', bbox_to_anchor=(0.568, 0.845), handlelength=1.2)


def _legend(ax) -> None:
    """On the title's line, where no curve runs."""
    ax.legend(ncol=3, loc='lower right', bbox_to_anchor=(1.0, 0.98), borderaxespad=0.0, markerscale=1.6,
              columnspacing=1.2, handletextpad=0.4, handlelength=1.2)


def _empty(ax, title, why) -> None:
    ax.set(title=title, yticks=[])
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha='center', va='center', color=MUTED)


def _shade(ax, status: list[FlightStatus], start: float) -> list[str]:
    """Colour the phases; those drawn, in order."""
    changes = [i for i in range(len(status)) if i == 0 or status[i].phase != status[i - 1].phase]
    left, right = ax.get_xlim()
    drawn: dict[str, None] = {}
    for n, i in enumerate(changes):
        if status[i].phase not in PHASE_COLOURS:
            continue
        begin = max(status[i].t - start, left)
        end = min((status[changes[n + 1]] if n + 1 < len(changes) else status[-1]).t - start, right)
        if end <= begin:
            continue
        ax.axvspan(begin, end, color=PHASE_COLOURS[status[i].phase], lw=0, zorder=0)
        drawn[status[i].phase] = None
    return list(drawn)


# --- animation ----------------------------------------------------------------------------------

def animate(flight: Flight, evaluation: Evaluation, path: Path) -> Path:
    """The trial as an animated picture at 10 frames a second: `path` ends in .gif, or in .mp4 (needs ffmpeg).
    ValueError for another name, or without ffmpeg."""
    writers = {'.gif': 'pillow', '.mp4': 'ffmpeg'}
    if path.suffix not in writers:
        raise ValueError(f'{path}: expected a name that ends in {" or ".join(writers)}')
    if not animation.writers.is_available(writers[path.suffix]):
        raise ValueError(f'{path}: {writers[path.suffix]} is not installed; a .gif needs no ffmpeg')
    start, end = interval(flight)
    flown, count = flight.motion.between(start, end), int(min(FRAMES, max(2.0, 10.0 * (end - start))))
    times = np.linspace(start, end, count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(8, 6.4), dpi=90)
        ax = figure.add_axes((-0.02, 0.02, 1.0, 0.94), projection='3d', computed_zorder=False)
        box = np.vstack([flown.position, np.array(evaluation.goal)[None]])

        def frame(t):
            ax.clear()
            centre, radius = (a[0] for a in flight.spheres.at(np.array([t])))
            for k in np.argsort(centre @ _camera()):
                if np.isfinite(centre[k]).all():
                    _ball(ax, centre[k], radius[k], SPHERE, 0.4)
            i = max(int(metrics.latest(np.array([t]), flown.t)[0]), 0)
            ax.plot(*flown.position[:i + 1].T, color=AXES[2], lw=2.2, zorder=6)
            ax.scatter(*flown.position[i], s=40, color=INK, zorder=8, depthshade=False)
            if (n := int(metrics.latest(np.array([t]), flight.plans.t)[0])) >= 0:
                ax.plot(*flight.plans.path[n].T, color=PLANNED, lw=1.6, marker='o', ms=3, zorder=7)
            ax.scatter(*evaluation.goal, s=130, marker='*', color=GOAL, zorder=9, depthshade=False)
            ax.set_title(f'{label(evaluation)}, {t - start:.1f} s after engage')
            _box(ax, np.vstack([box, centre[np.isfinite(centre).all(axis=1)].reshape(-1, 3)]))
        made = animation.FuncAnimation(figure, frame, times, interval=100)
        made.save(path, writer=writers[path.suffix], fps=10)
        plt.close(figure)
    return path
