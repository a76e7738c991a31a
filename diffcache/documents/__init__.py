"""The two documents, schedule and profile, which are pure data and can be read and written without torch."""

from diffcache.documents.budget import Budget
from diffcache.documents.profile import Profile
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan, Guidance, Online, SitePlan

__all__ = ["Budget", "CacheSchedule", "DenoiserPlan", "Guidance", "Online", "Profile", "SitePlan"]
