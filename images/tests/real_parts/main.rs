//! Images end to end: against Debian's `docker-registry`, filled by `skopeo` with what `umoci` built, and against
//! a server that lies. The tests need root: unpacking sets owners, and overlayfs is mounted to compare trees.

mod bed;
mod compose;
mod hostile;
mod import;
mod pull;
mod server;
mod store;
mod tree;
