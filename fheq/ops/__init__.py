"""The op table and its rows, by kind."""

from fheq.ops import distances as distances
from fheq.ops import elementwise as elementwise
from fheq.ops import linear as linear
from fheq.ops import movement as movement
from fheq.ops import normalizations as normalizations
from fheq.ops import pooling as pooling
from fheq.ops import quantizers as quantizers
from fheq.ops import recurrent as recurrent
from fheq.ops import reductions as reductions
from fheq.ops import resize as resize
from fheq.ops import sampling as sampling
from fheq.ops import scatter as scatter
from fheq.ops import shapes as shapes
from fheq.ops import spectra as spectra
from fheq.ops.table import Kind as Kind
from fheq.ops.table import Op as Op
from fheq.ops.table import find as find
from fheq.ops.table import lookup as lookup
from fheq.ops.table import register as register
from fheq.ops.table import rows as rows
