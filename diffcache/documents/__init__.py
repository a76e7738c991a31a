"""Documents (schedule, schedule set, profile): pure data that can be read and written without torch."""

from diffcache.documents.branches import BranchLayout
from diffcache.documents.budget import Budget
from diffcache.documents.circumstances import Guidance, NoiseSchedulerId
from diffcache.documents.expected import Expected, Origin
from diffcache.documents.profile import DenoiserProfile, Dynamics, KeptProfile, Profile, SiteProfile, Tables
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan, Online, SitePlan, StoreFormat
from diffcache.documents.schedule_set import ScheduleSet
from diffcache.documents.sites import GRANULARITIES
from diffcache.documents.token_profile import DriftTables, TokenProfile
from diffcache.documents.token_schedule import TokenExpected, TokenSchedule

__all__ = [
    "GRANULARITIES",
    "BranchLayout",
    "Budget",
    "CacheSchedule",
    "DenoiserPlan",
    "DenoiserProfile",
    "DriftTables",
    "Dynamics",
    "Expected",
    "Guidance",
    "KeptProfile",
    "NoiseSchedulerId",
    "Online",
    "Origin",
    "Profile",
    "ScheduleSet",
    "SitePlan",
    "SiteProfile",
    "StoreFormat",
    "Tables",
    "TokenExpected",
    "TokenProfile",
    "TokenSchedule",
]
