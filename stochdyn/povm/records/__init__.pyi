from .inference import RecordModel as RecordModel
from .inference import infer_parameters as infer_parameters
from .measurement import MeasurementRecords as MeasurementRecords
from .measurement import RecordLaw as RecordLaw
from .measurement import simulate_records as simulate_records
