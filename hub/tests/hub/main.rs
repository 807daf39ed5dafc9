//! A whole hub as a process, with a real broker and devices that behave like agents.

mod api;
mod bed;
mod device;
mod images;
mod repair;
mod rollout;
