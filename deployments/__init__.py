"""Schedules, work pools and limits of the flows, for a team whose runs start by themselves."""
