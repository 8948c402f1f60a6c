from .model import EncodedVideo as EncodedVideo
from .model import VideoModel as VideoModel
from .networks import ContextEncoder as ContextEncoder
from .networks import FrameDecoder as FrameDecoder
from .networks import FrameEncoder as FrameEncoder
from .networks import JointControl as JointControl
from .networks import VideoNetworks as VideoNetworks
