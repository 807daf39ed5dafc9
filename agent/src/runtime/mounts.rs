//! Copies of mounts that are mounted nowhere yet: open_tree(2), mount_setattr(2) and move_mount(2).
//!
//! libcontainer needs these calls too, so a kernel without them (before Linux 5.12) runs no containers anyway.

use std::ffi::CString;
use std::fs::File;
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
const AT_RECURSIVE: libc::c_uint = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

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
        Self::open(path, 0)
    }

    /// Copies what is mounted below `path` too.
    pub(crate) fn copy_tree(path: &Path) -> io::Result<Self> {
        Self::open(path, AT_RECURSIVE)
    }

    fn open(path: &Path, flags: libc::c_uint) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let flags = flags | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC.cast_unsigned();
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
        let attributes = Attributes {
            set: MOUNT_ATTR_RDONLY,
            ..Attributes::default()
        };
        self.change(&attributes, 0)
    }

    /// Maps the ids of everything in the copy as `namespace` maps them: what is id 0 in the file system is id 0 in there.
    ///
    /// # Errors
    ///
    /// EINVAL when a file system in it cannot be mapped, or the kernel is older than 5.12.
    pub(crate) fn map_ids(&self, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let attributes = Attributes {
            set: MOUNT_ATTR_IDMAP,
            user_namespace: u64::from(namespace.as_raw_fd().unsigned_abs()),
            ..Attributes::default()
        };
        self.change(&attributes, AT_RECURSIVE)
    }

    /// Mounts the copy on `target`.
    pub(crate) fn attach(self, target: &Path) -> io::Result<()> {
        let target = CString::new(target.as_os_str().as_bytes())?;
        // SAFETY: both paths are C strings that live through the call.
        #[expect(unsafe_code, reason = "move_mount(2) has no wrapper")]
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn change(&self, attributes: &Attributes, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: the path is a C string, and the kernel reads no more of the attributes than their size says.
        #[expect(unsafe_code, reason = "mount_setattr(2) has no wrapper")]
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                flags | libc::AT_EMPTY_PATH.cast_unsigned(),
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

    /// What it is a copy of.
    pub(crate) fn metadata(&self) -> io::Result<std::fs::Metadata> {
        File::from(self.0.try_clone()?).metadata()
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
