//! `foreshore-agent shim DIR`: builds and starts one container from `DIR/request.json`, then becomes its parent.
//!
//! ```text
//! agent ── spawns ──> foreshore-agent shim DIR       (this file: one thread, never returns on success)
//!                       ├─ own session, own mount namespace, overlay of the layers
//!                       ├─ libcontainer: build ──> container's first process, waiting
//!                       ├─ record.json names it; swap off; disks and devices limited; loopback up
//!                       ├─ libcontainer: start
//!                       └─ execve foreshore-shim      (same pid, the container's parent)
//! ```
//!
//! It says how it went in one line of JSON on standard output; end of file there means that foreshore-shim runs.
//! On failure nothing runs any more; the agent removes what is left on disk and of cgroups, because it must be
//! able to do that anyway after this process was killed in the middle.
//!
//! libcontainer must not be called in a process with threads: it forks without the care that needs. Hence a fresh
//! process for each container.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use foreshore_killpoint as killpoint;
use foreshore_protocol::manifest::{NetworkMode, SECRETS_DIR, Service, VolumeSource};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Pid, Uid};
use serde_json::{Value, json};

use crate::causes::chain;
use crate::disk::block::DiskError;
use crate::runtime::backstage::{Backstage, BackstageError, CONFIGS, ROOTFS, SECRETS, lacks};
use crate::runtime::device_filter;
use crate::runtime::devices::{self, AccessError};
use crate::runtime::io_limits::IoLimits;
use crate::runtime::mount_table;
use crate::runtime::mounts::Detached;
use crate::runtime::process::{FORKING, Identity, PidFd};
use crate::runtime::request::{
    CONFIG, LIBRARY, RECORD, REQUEST, Record, Request, StartReport, read_json, write_json,
};
use crate::runtime::rootfs::{Root, Seclusion, Step as _, StepError, make_volume};
use crate::runtime::seal;
use crate::runtime::secrets;
use crate::runtime::spec::{self, Refusal};
use crate::runtime::user::{self, User};
use crate::runtime::userns::{self, UserNamespace};
use crate::runtime::workload::{REFUSED, Workload};

/// Runs the subcommand with the arguments after its name. Returns only on failure, having said why on standard
/// output. Must be called before any thread exists.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let (Some(dir), None) = (arguments.next(), arguments.next()) else {
        report(&StartReport::Failed(
            "usage: foreshore-agent shim DIR".to_owned(),
        ));
        return ExitCode::from(2);
    };
    let failure = match start(&PathBuf::from(dir)) {
        Ok(never) => match never {},
        Err(Failure::Refused(refusal)) => StartReport::Refused(refusal),
        Err(Failure::Unmappable(reason)) => StartReport::Unmappable(reason),
        Err(Failure::Denied(message)) => StartReport::Denied(message),
        Err(Failure::Missing(message)) => StartReport::Missing(message),
        Err(Failure::IoLimit(message)) => StartReport::IoLimit(message),
        Err(Failure::Failed(message)) => StartReport::Failed(message),
    };
    report(&failure);
    ExitCode::FAILURE
}

/// Nobody may be listening any more; then the next agent finds out from disk.
fn report(report: &StartReport) {
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        let mut out = io::stdout().lock();
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

enum Failure {
    Refused(String),
    Unmappable(String),
    Denied(String),
    Missing(String),
    IoLimit(String),
    Failed(String),
}

impl From<AccessError> for Failure {
    fn from(error: AccessError) -> Self {
        let text = chain(&error);
        match error {
            AccessError::Denied(_) => Self::Denied(text),
            AccessError::Missing(_) => Self::Missing(text),
            AccessError::NotADevice(_) | AccessError::Refused(_) => Self::Refused(text),
            AccessError::Io { .. } => Self::Failed(text),
        }
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        let text = chain(&error);
        match error {
            DiskError::Missing(_) => Self::Missing(text),
            DiskError::NotADisk(_) | DiskError::NoDisk { .. } => Self::IoLimit(text),
            DiskError::Io { .. } => Self::Failed(text),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.to_string())
    }
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        Self::Failed(chain(&error))
    }
}

impl From<BackstageError> for Failure {
    fn from(error: BackstageError) -> Self {
        match error {
            BackstageError::Step(step) => step.into(),
            BackstageError::Unmappable(reason) => Self::Unmappable(reason),
        }
    }
}

fn start(dir: &Path) -> Result<Infallible, Failure> {
    seal::ensure().step(|| "seal the own program".to_owned())?;
    // Signals to the agent's group and its terminal are not for this process.
    let _it_leads_one_already = nix::unistd::setsid();
    // libcontainer leaves them as they are when the container's user is in no group.
    nix::unistd::setgroups(&[]).step(|| "leave the agent's groups".to_owned())?;
    let request: Request =
        read_json(&dir.join(REQUEST)).step(|| format!("read {}", dir.join(REQUEST).display()))?;
    let mut record: Record =
        read_json(&dir.join(RECORD)).step(|| format!("read {}", dir.join(RECORD).display()))?;
    let own_pid = Pid::this().as_raw();
    record.shim = Some(Identity::of(own_pid).step(|| "read the own start time".to_owned())?);
    let save = |record: &Record| {
        write_json(dir, RECORD, record).step(|| format!("write {}", dir.join(RECORD).display()))
    };
    save(&record)?;
    killpoint::reached("shim", "recorded");
    if let Some(leaf) = &request.shim_cgroup {
        fs::write(leaf.join("cgroup.procs"), "0").step(|| format!("enter {}", leaf.display()))?;
    }
    let run_dir = File::open(dir).step(|| format!("open {}", dir.display()))?;
    // Goes with the descriptor, through the shim to its end: so it can be waited for by whoever has lost the record.
    run_dir
        .lock_shared()
        .step(|| format!("lock {}", dir.display()))?;
    // A disk too full for logs is no reason not to run.
    let log_dir = open_log_dir(&request.logs).ok();
    let said = Said::listen().step(|| "make a file for messages".to_owned())?;

    // Before anything of the device is hidden.
    let io_limits = IoLimits::find(&request.service.blkio_config, &request.state)?;
    let namespace = request.base.map(user_namespace).transpose()?;
    let seclusion = Seclusion::enter()?;
    let Prepared {
        mut configuration,
        user,
    } = prepare(dir, &request, namespace.as_ref())?;
    killpoint::reached("shim", "mounted");
    let base = request.base.unwrap_or(0);
    let (stdout, stdout_end) = pipe(&user, base)?;
    let (stderr, stderr_end) = pipe(&user, base)?;
    nix::sys::prctl::set_name(FORKING).step(|| "take a name".to_owned())?;
    let mut container = build(dir, &request.id.to_string(), stdout_end, stderr_end)
        .map_err(|error| said.explain(&error))?;
    let pid = container.pid().map_or(0, Pid::as_raw);
    killpoint::reached("shim", "built");

    let rest = || -> Result<Infallible, Failure> {
        seclusion.leave()?;
        // Commands look at the same file from here, where the root is not to be seen; a path that exists is all they
        // need.
        configuration["root"]["path"] = json!(dir);
        write_configuration(dir, &configuration)?;
        let pidfd = PidFd::open(pid).step(|| format!("open container process {pid}"))?;
        // The container goes first, then the agent, which comes back by itself; without its shim a container is lost.
        // Where that is not allowed, what the library set for the container is undone at least.
        fs::write("/proc/self/oom_score_adj", SHIM_OOM_SCORE_ADJ)
            .or_else(|_| fs::write("/proc/self/oom_score_adj", "0"))
            .step(|| "reset the own OOM score".to_owned())?;
        record.container =
            Some(Identity::of(pid).step(|| "read the container's start time".to_owned())?);
        // From here on the container can be found; without this it must not run.
        save(&record)?;
        killpoint::reached("shim", "adoptable");
        if let Some(file) = request.swap_file.as_ref().filter(|file| file.exists()) {
            fs::write(file, "0").step(|| format!("write {}", file.display()))?;
        }
        let limited = io_limits.set(&request.cgroups);
        limited.map_err(|error| Failure::IoLimit(chain(&error)))?;
        if let Some(cgroup) = &request.device_cgroup {
            filter_devices(cgroup, &configuration)?;
        }
        if request.service.network_mode == NetworkMode::None {
            open_network(&pidfd).step(|| "bring up the container's loopback".to_owned())?;
        }
        let mounts = format!("/proc/{pid}/mountinfo");
        let mounts = fs::read_to_string(&mounts).step(|| format!("read {mounts}"))?;
        mount_table::check(&configuration, &mounts, |path| {
            Path::new(&format!("/proc/{pid}/root{path}")).exists()
        })
        .map_err(|wrong| {
            Failure::Failed(format!(
                "the container's mounts are not as asked for: {wrong}"
            ))
        })?;
        container.start().map_err(|error| said.explain(&error))?;
        killpoint::reached("shim", "started");
        report(&StartReport::Started);
        killpoint::reached("shim", "reported");
        become_shim(&request, pid, [stdout, stderr], log_dir, run_dir, pidfd)
    };
    rest().inspect_err(|_| {
        if pid > 0 {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
        }
    })
}

fn open_log_dir(path: &Path) -> io::Result<File> {
    fs::create_dir_all(path)?;
    File::open(path)
}

/// What the rest of the start needs to know.
struct Prepared {
    configuration: Value,
    user: User,
}

/// Makes the user namespace whose id 0 is `base`, if this kernel lets it do what a container needs.
fn user_namespace(base: u32) -> Result<UserNamespace, Failure> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .step(|| "read /proc/self/mountinfo".to_owned())?;
    for (kind, point) in [("proc", "/proc"), ("sysfs", "/sys")] {
        if !userns::is_bare(&mounts, kind, point) {
            return Err(Failure::Unmappable(format!(
                "parts of {point} are hidden from the agent, so no user namespace may mount it"
            )));
        }
    }
    UserNamespace::create(base).map_err(|error| match lacks(&error) {
        true => Failure::Unmappable(format!("no user namespace can be made ({error})")),
        false => Failure::Failed(format!("failed to make a user namespace: {error}")),
    })
}

/// Mounts the root file system and writes `config.json`.
fn prepare(
    dir: &Path,
    request: &Request,
    namespace: Option<&UserNamespace>,
) -> Result<Prepared, Failure> {
    let Request { service, image, .. } = request;
    let (name, grant) = (
        request.id.service.as_str(),
        request.grant.clone().resolved(),
    );
    grant.allows(name, service).map_err(AccessError::from)?;
    let nodes = devices::find(&grant, name, service)?;
    let sources = devices::bind_sources(&grant, name, service)?;
    let held = sources
        .iter()
        .map(|source| (source.named.as_path(), source.path()));
    // Before something is mounted where the run directory may be.
    let secrets = secrets::has_files(service).then(|| {
        let path = dir.join(secrets::FILES);
        Detached::copy(&path).step(|| format!("open {}", path.display()))
    });
    let secrets = secrets.transpose()?;
    let mut backstage = Backstage::mount(namespace, held)?;
    drop(sources);
    backstage.mount_overlay(&request.layers, request.writable.as_deref())?;
    let root = Root::open(Path::new(ROOTFS), request.base.unwrap_or(0))?;
    root.check_plain()?;
    let user = user::resolve(
        spec::user_text(service, image),
        &root.database("etc/passwd")?,
        &root.database("etc/group")?,
    )?;
    if namespace.is_some() {
        user.fit(userns::IDS)?;
    }
    // From here on with every mount point where it really is.
    let service = &real_mount_points(service, &root)?;
    prepare_volumes(request, service, &root, &user)?;
    backstage.write_configs(&service.configs)?;
    let mut secrets_at = None;
    if let Some(copy) = secrets {
        backstage.place_secrets(copy)?;
        let base = request.base.unwrap_or(0);
        secrets::own(Path::new(SECRETS), service, &user, base)
            .step(|| "give the secrets to the container".to_owned())?;
        secrets_at = Some(root.mount_point(SECRETS_DIR)?);
    }
    root.make_working_dir(&spec::working_dir(service, image))?;
    let present = ["/etc/hosts", "/etc/resolv.conf"]
        .into_iter()
        .filter(|path| Path::new(path).is_file());
    let host_files: Vec<&str> = present.collect();
    let input = spec::Input {
        id: &request.id,
        service,
        image,
        user: &user,
        cgroup: &request.cgroup,
        volumes: &request.volumes,
        configs: Path::new(CONFIGS),
        secrets: secrets_at
            .as_deref()
            .map(|target| (Path::new(SECRETS), target)),
        secret_environment: &request.secret_environment,
        update_lock: request.update_lock.as_deref(),
        swap_limit: request.swap_limit,
        cgroup_namespace: Path::new("/proc/self/ns/cgroup").exists(),
        max_nofile: nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map_or(u64::MAX, |(_, hard)| hard),
        host_files: &host_files,
    };
    let mut configuration = spec::configuration(&input)?;
    configuration["root"]["path"] = json!(ROOTFS);
    devices::add(&nodes, &mut configuration);
    if let Some(namespace) = namespace {
        join(&mut configuration, namespace, &backstage)?;
    }
    backstage.take_in(&mut configuration)?;
    if let Some(hostname) = spec::hostname(&input) {
        root.write_etc("hostname", &format!("{hostname}\n"))?;
        root.write_etc(
            "hosts",
            &format!("127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost\n"),
        )?;
        root.write_etc("resolv.conf", "")?;
    }
    write_configuration(dir, &configuration)?;
    Ok(Prepared {
        configuration,
        user,
    })
}

fn write_configuration(dir: &Path, configuration: &Value) -> Result<(), StepError> {
    write_json(dir, CONFIG, configuration).step(|| format!("write {}", dir.join(CONFIG).display()))
}

/// Makes `configuration` one for a container in `namespace`.
fn join(
    configuration: &mut Value,
    namespace: &UserNamespace,
    backstage: &Backstage<'_>,
) -> Result<(), StepError> {
    let namespaces = configuration["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.expect("every configuration has namespaces");
    let own_network = namespaces.iter().any(|one| one["type"] == "network");
    namespaces.push(json!({"type": "user", "path": namespace.path()}));
    backstage.make_nodes(configuration)?;
    if own_network {
        return Ok(());
    }
    let mounts = configuration["mounts"].as_array_mut();
    for mount in mounts.into_iter().flatten() {
        if mount["type"] == "sysfs" {
            *mount = json!({"destination": "/sys", "type": "bind", "source": backstage.mount_sys()?,
                            "options": ["bind", "nosuid", "noexec", "nodev", "ro"]});
        }
    }
    Ok(())
}

fn real_mount_points(service: &Service, root: &Root) -> Result<Service, Refusal> {
    let mut service = service.clone();
    for volume in &mut service.volumes {
        volume.target = root.mount_point(&volume.target)?;
    }
    for config in &mut service.configs {
        config.target = root.mount_point(&config.target)?;
    }
    for tmpfs in &mut service.tmpfs {
        tmpfs.target = root.mount_point(&tmpfs.target)?;
    }
    Ok(service)
}

fn prepare_volumes(
    request: &Request,
    service: &Service,
    root: &Root,
    user: &User,
) -> Result<(), Failure> {
    for volume in &service.volumes {
        if let VolumeSource::Named(_) = &volume.source {
            let path = spec::volume_path(&request.volumes, &volume.source);
            make_volume(&path, root.owner(&volume.target), (user.uid, user.gid))?;
        }
    }
    Ok(())
}

/// A pipe whose writing end the container's user may open again, as `/dev/stdout`.
fn pipe(user: &User, base: u32) -> Result<(OwnedFd, OwnedFd), StepError> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).step(|| "make a pipe".to_owned())?;
    // Only this end: the container's programs expect theirs to block.
    fcntl(read.as_raw_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .step(|| "set up a pipe".to_owned())?;
    nix::unistd::fchown(
        write.as_raw_fd(),
        Some(Uid::from_raw(base + user.uid)),
        Some(Gid::from_raw(base + user.gid)),
    )
    .step(|| "set up a pipe".to_owned())?;
    Ok((read, write))
}

fn build(
    dir: &Path,
    id: &str,
    stdout: OwnedFd,
    stderr: OwnedFd,
) -> Result<Container, libcontainer::error::LibcontainerError> {
    let library = dir.join(LIBRARY);
    let other = libcontainer::error::LibcontainerError::OtherIO;
    fs::create_dir_all(&library).map_err(other)?;
    ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(library)?
        .validate_id()?
        .with_executor(Workload::new())
        .with_stdin(File::open("/dev/null").map_err(other)?)
        .with_stdout(stdout)
        .with_stderr(stderr)
        .as_init(dir)
        .with_systemd(false)
        .with_detach(true)
        .build()
}

/// What libcontainer logs as errors, in this process and the ones it forks. Its error values lose the causes on
/// their way between processes; the log has them.
struct Said(Arc<File>);

impl Said {
    fn listen() -> io::Result<Self> {
        let fd = nix::sys::memfd::memfd_create(
            c"errors",
            nix::sys::memfd::MemFdCreateFlag::MFD_CLOEXEC,
        )?;
        let file = Arc::new(File::from(fd));
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::ERROR)
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_level(false)
            .with_writer(Arc::clone(&file))
            .finish();
        // Somebody else's subscriber would only mean less precise messages.
        let _ = tracing::subscriber::set_global_default(subscriber);
        Ok(Self(file))
    }

    /// A refusal if the workload's checks refused; otherwise the error with what was logged about it.
    fn explain(&self, error: &dyn std::error::Error) -> Failure {
        let text = chain(error);
        if let Some((_, refusal)) = text.split_once(REFUSED) {
            // Passed on once per process it went through.
            let refusal = refusal
                .split_once(": refused: ")
                .map_or(refusal, |(first, _)| first);
            return Failure::Refused(refusal.to_owned());
        }
        let mut logged = String::new();
        let mut file: &File = &self.0;
        let _ = file
            .rewind()
            .and_then(|()| file.take(4096).read_to_string(&mut logged));
        match logged.lines().next().map(str::trim) {
            Some(first) if !first.is_empty() => Failure::Failed(format!("{text} ({first})")),
            _ => Failure::Failed(text),
        }
    }
}

/// On cgroup v2, where libcontainer leaves all devices open. It has made the container's own device nodes by now.
fn filter_devices(cgroup: &Path, configuration: &Value) -> Result<(), Failure> {
    let rules =
        device_filter::rules(configuration).map_err(|error| Failure::Failed(error.to_string()))?;
    device_filter::attach(cgroup, &rules).step(|| {
        "limit the container to its devices (the kernel needs CONFIG_CGROUP_BPF)".to_owned()
    })?;
    Ok(())
}

/// In the container's network namespace: loopback up, and low ports for everyone, as Docker has it; nobody else
/// shares them there.
fn open_network(container: &PidFd) -> io::Result<()> {
    let own = File::open("/proc/self/ns/net")?;
    setns(container.fd(), CloneFlags::CLONE_NEWNET)?;
    let raised = raise_loopback();
    // An old kernel without it is fine.
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    setns(&own, CloneFlags::CLONE_NEWNET)?;
    raised
}

/// netdevice(7): SIOCSIFFLAGS on `lo`.
#[expect(unsafe_code, reason = "ioctl(2) with a struct ifreq")]
fn raise_loopback() -> io::Result<()> {
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    // SAFETY: all zeroes is a valid ifreq of plain integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes_with_nul()) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: both requests read and write this ifreq, which lives through the calls; the kernel fills the union
    // with flags before they are read.
    unsafe {
        if libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS as _,
            &raw mut request,
        ) != 0
        {
            return Err(io::Error::last_os_error());
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "IFF_UP and IFF_RUNNING are low bits"
        )]
        let up = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        request.ifr_ifru.ifru_flags |= up;
        if libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        ) != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

const SHIM_OOM_SCORE_ADJ: &str = "-999";

/// Where foreshore-shim expects what; see `agent/shim/src/main.rs`.
const SHIM_STDOUT: RawFd = 3;
const SHIM_STDERR: RawFd = 4;
const SHIM_LOGS: RawFd = 5;
const SHIM_RUN: RawFd = 6;
const SHIM_PIDFD: RawFd = 7;
/// Above all of these.
const ASIDE: RawFd = 32;

fn become_shim(
    request: &Request,
    pid: i32,
    [stdout, stderr]: [OwnedFd; 2],
    log_dir: Option<File>,
    run_dir: File,
    pidfd: PidFd,
) -> Result<Infallible, Failure> {
    let null: OwnedFd = File::open("/dev/null")
        .step(|| "open /dev/null".to_owned())?
        .into();
    let act = || "arrange descriptors for foreshore-shim".to_owned();
    let aside = |fd: &OwnedFd| fcntl(fd.as_raw_fd(), FcntlArg::F_DUPFD_CLOEXEC(ASIDE)).step(act);
    let mut moves = vec![
        (aside(&stdout)?, SHIM_STDOUT),
        (aside(&stderr)?, SHIM_STDERR),
        (aside(&run_dir.into())?, SHIM_RUN),
        (aside(&pidfd.into_fd())?, SHIM_PIDFD),
    ];
    // The last word to the agent must be possible until execve has worked.
    let report_end = fcntl(1, FcntlArg::F_DUPFD_CLOEXEC(ASIDE)).step(act)?;
    let null = aside(&null)?;
    match log_dir {
        Some(dir) => moves.push((aside(&dir.into())?, SHIM_LOGS)),
        None => drop(nix::unistd::close(SHIM_LOGS)),
    }
    moves.extend([(null, 0), (null, 1), (null, 2)]);
    for (from, to) in moves {
        nix::unistd::dup2(from, to).step(act)?;
    }
    let text = |text: String| CString::new(text).map_err(io::Error::other).step(act);
    let arguments = [
        text("foreshore-shim".to_owned())?,
        text(request.id.to_string())?,
        text(pid.to_string())?,
        text(request.service.logging.max_size.0.to_string())?,
        text(request.service.logging.max_file.to_string())?,
        text(format!("{}.log", request.id.service))?,
    ];
    let program = CString::new(request.shim.as_os_str().as_encoded_bytes())
        .map_err(io::Error::other)
        .step(act)?;
    let Err(error) = nix::unistd::execve::<_, CString>(&program, &arguments, &[]);
    let _ = nix::unistd::dup2(report_end, 1);
    Err(error)
        .step(|| format!("execute {}", request.shim.display()))
        .map_err(Failure::from)
}
