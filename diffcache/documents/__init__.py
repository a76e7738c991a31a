"""The two documents, schedule and profile, which are pure data and can be read and written without torch."""

from diffcache.documents.branches import BranchLayout
from diffcache.documents.budget import Budget
from diffcache.documents.circumstances import Guidance, NoiseSchedulerId
from diffcache.documents.expected import Expected, Origin
from diffcache.documents.profile import DenoiserProfile, Dynamics, KeptProfile, Profile, SiteProfile, Tables
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan, Online, SitePlan
from diffcache.documents.sites import GRANULARITIES

__all__ = [
    "GRANULARITIES",
    "BranchLayout",
    "Budget",
    "CacheSchedule",
    "DenoiserPlan",
    "DenoiserProfile",
    "Dynamics",
    "Expected",
    "Guidance",
    "KeptProfile",
    "NoiseSchedulerId",
    "Online",
    "Origin",
    "Profile",
    "SitePlan",
    "SiteProfile",
    "Tables",
]
