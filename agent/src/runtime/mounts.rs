//! Copies of mounts that are mounted nowhere yet: open_tree(2), mount_setattr(2) and move_mount(2).
//!
//! libcontainer needs these calls too, so a kernel without them (before Linux 5.12) runs no containers anyway.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// A copy of the mount that a path is on, beginning at that path. It goes with its last descriptor, or with the
/// namespace it was attached to.
#[derive(Debug)]
pub(crate) struct Detached(OwnedFd);

/// linux/mount.h; libc types these differently from one C library to the next.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_int = libc::O_CLOEXEC;
const MOUNT_ATTR_RDONLY: u64 = 1;

/// `struct mount_attr`, mount_setattr(2).
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

impl Detached {
    /// Copies the one mount that `path` is on, without what is mounted below it. A file can be copied too.
    pub(crate) fn copy(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC.cast_unsigned();
        // SAFETY: the path is a C string that lives through the call.
        #[expect(unsafe_code, reason = "open_tree(2) has no wrapper")]
        let fd =
            unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        #[expect(unsafe_code, reason = "the call gives a raw descriptor")]
        // SAFETY: the kernel just gave us this descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes the copy read-only. Nobody without power over the namespace it is in can undo that, and as long as it is
    /// detached there is none.
    pub(crate) fn read_only(&self) -> io::Result<()> {
        self.change(&Attributes {
            set: MOUNT_ATTR_RDONLY,
            ..Attributes::default()
        })
    }

    fn change(&self, attributes: &Attributes) -> io::Result<()> {
        // SAFETY: the path is a C string, and the kernel reads no more of the attributes than their size says.
        #[expect(unsafe_code, reason = "mount_setattr(2) has no wrapper")]
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                std::ptr::from_ref(attributes),
                size_of::<Attributes>(),
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The descriptor, for as long as the copy is to stay.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for Detached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
