from .cells import from_anndata as from_anndata
from .cells import from_npz as from_npz
from .cells import pca as pca
from .snapshots import Snapshot as Snapshot
from .snapshots import Snapshots as Snapshots
