//! Jails for husk: root sets one up, and a husk without privileges runs in it, in the memory that is loaded already.
//!
//! [`Jail`] is `husk jail`: a root in memory, all namespaces, a process that waits outside. [`chroot`] is what
//! Firecracker's jailer makes: a directory that its clients fill. Both open everything by descriptor first, and fail
//! closed: a step that fails ends the process before husk has begun.
//!
//! Knows nothing of VMs. docs/jail.md says for whom this is.
mod cgroup;
pub(crate) mod chroot;
mod error;
mod path;
mod privileges;
mod process;
mod root;
mod sys;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::process::Resource;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

pub(crate) use cgroup::{Existing, Group, IO_WORDS, IoMax, Limits, Mounted, Setting, Version};
pub(crate) use error::JailError;
pub(crate) use path::{Kind, Owner, open};
pub(crate) use privileges::Limit;
pub(crate) use process::forget_inheritance;
pub(crate) use root::Entry;

use root::Detached;

/// A jail as it is to be, with everything in it open.
#[derive(Debug)]
pub(crate) struct Jail {
    /// What the host is called in there.
    pub(crate) id: String,
    pub(crate) owner: Owner,
    pub(crate) entries: Vec<Entry>,
    /// The network namespace; a new one if there is none.
    pub(crate) network: Option<OwnedFd>,
    pub(crate) group: Group,
    pub(crate) limits: Vec<Limit>,
    pub(crate) has_user_namespace: bool,
    pub(crate) has_proc: bool,
}

/// Which process this is, once there is a jail.
#[derive(Debug)]
pub(crate) enum Side {
    /// The one that is jailed.
    Inside,
    /// The other, when the jail has ended with this exit code.
    Outside(i32),
}

impl Jail {
    /// Goes into the jail: returns there when all is done, and here when the jail has ended.
    pub(crate) fn enter(mut self) -> Result<Side, JailError> {
        let (outer, inner) = process::link()?;
        let signals = process::hold_signals()?;
        sys::unshare(UnshareFlags::NEWPID)
            .map_err(JailError::host("make a process namespace, which needs root"))?;
        let Some(child) = sys::fork().map_err(JailError::host("make a process"))? else {
            drop(outer);
            self.group.disown();
            return self.close_behind(&inner).map(|()| Side::Inside);
        };
        drop(inner);
        // What is in the jail is the jail's alone: a tap goes when that ends.
        let Self { entries, network, group, owner, has_user_namespace, .. } = self;
        drop((entries, network));
        let mut kept = group.descriptors();
        kept.push(outer.as_raw_fd());
        kept.extend(crate::logger::descriptor());
        let watched = sys::close_all_but(&kept)
            .map_err(JailError::host("close descriptors"))
            .and_then(|()| match has_user_namespace {
                true => process::map_user(&outer, child, owner),
                false => Ok(()),
            })
            .and_then(|()| process::wait(child, &signals));
        if watched.is_err() {
            process::kill(child);
        }
        drop(group);
        watched.map(Side::Outside)
    }

    /// In the process that is jailed: all steps, in their order.
    fn close_behind(self, link: &OwnedFd) -> Result<(), JailError> {
        process::take_signals()?;
        // Nothing that is written can be pushed back into the terminal of whoever started us.
        rustix::process::setsid().map_err(JailError::host("make a session"))?;
        self.group.join()?;
        let mut flags = UnshareFlags::NEWNS
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWCGROUP;
        match &self.network {
            Some(network) => join_network(network)?,
            None => flags |= UnshareFlags::NEWNET,
        }
        sys::unshare(flags).map_err(JailError::host("make namespaces, which needs root"))?;
        rustix::system::sethostname(self.id.as_bytes())
            .map_err(JailError::host("set the host's name"))?;
        let root = root::enter(Detached::tmpfs()?)?.without_mounts();
        root::fill(&root, &self.entries, self.owner)?;
        if self.has_proc {
            root::add_proc(&root)?;
        }
        root::seal(&root)?;
        privileges::limit(&self.limits)?;
        if self.has_user_namespace {
            process::enter_user_namespace(link)?;
        }
        privileges::drop_all(self.owner)?;
        process::tie(link)?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        Ok(())
    }
}

/// Limits that hold in every jail unless others are given.
pub(crate) fn default_limits(descriptors: u64) -> [Limit; 2] {
    // One that is lower already stays.
    let most = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(descriptors);
    [(Resource::Nofile, descriptors.min(most)), (Resource::Core, 0)]
}

fn join_network(namespace: &OwnedFd) -> Result<(), JailError> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| match e {
            rustix::io::Errno::INVAL => JailError::Refused(
                "--netns is no network namespace; name one of those in /run/netns: ip netns add NAME"
                    .into(),
            ),
            e => JailError::host("join the network namespace")(e),
        })
}
