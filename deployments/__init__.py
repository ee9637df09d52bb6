"""Schedules, work pools and limits of the flows; empty until a team asks for runs that start by themselves."""
