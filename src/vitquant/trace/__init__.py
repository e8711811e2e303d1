"""What a model does: its operations, seen and rewritten while the model runs. Knows nothing of number formats."""

from vitquant.trace.flow import NormGroup
from vitquant.trace.intercept import Interceptor, Transform
from vitquant.trace.site import ACTIVATION_ROLES, CONTRACTION_ROLES, CallKey, Role, Site
from vitquant.trace.trace import SiteInfo, Trace, observe

__all__ = [
    "ACTIVATION_ROLES",
    "CONTRACTION_ROLES",
    "CallKey",
    "Interceptor",
    "NormGroup",
    "Role",
    "Site",
    "SiteInfo",
    "Trace",
    "Transform",
    "observe",
]
