//! Devices as words of the command line: a path or a number, then options with commas between.
use std::num::ParseIntError;
use std::path::PathBuf;
use std::str::FromStr;

use devices::backend::tap::DESCRIPTOR;

use super::flags::number;
use super::limits::LimitArgs;
use crate::{MmdsVersion, balloon, block, mem, net, pmem};

/// The options in `words`, none of which contradicts another.
pub(super) fn options<'a>(words: impl Iterator<Item = &'a str>) -> Result<Vec<&'a str>, String> {
    let mut options: Vec<&str> = Vec::new();
    for word in words {
        if let Some(other) = options.iter().find(|other| subject(other) == subject(word)) {
            return Err(format!("there is '{other}', and '{word}': which of them?"));
        }
        options.push(word);
    }
    Ok(options)
}

/// What an option is about.
fn subject(option: &str) -> &str {
    match option.split_once('=').map_or(option, |(key, _)| key) {
        "rw" => "ro",
        "fd" => "tap",
        key => key,
    }
}

/// A number that is called `name`.
pub(super) fn named<T: FromStr<Err = ParseIntError>>(name: &str, s: &str) -> Result<T, String> {
    number(s).map_err(|why| format!("{name} '{s}': {why}"))
}

/// `MIB[,deflate-on-oom][,stats=SECONDS][,hinting][,reporting]`
pub(super) fn parse_balloon(s: &str) -> Result<balloon::Config, String> {
    let mut words = s.split(',');
    let amount = words.next().unwrap_or_default();
    let amount_mib = named("MiB", amount)?;
    let mut config = balloon::Config { amount_mib, ..balloon::Config::default() };
    for word in options(words)? {
        match word.split_once('=') {
            None if word == "deflate-on-oom" => config.deflate_on_oom = true,
            None if word == "hinting" => config.free_page_hinting = true,
            None if word == "reporting" => config.free_page_reporting = true,
            Some(("stats", interval)) => {
                config.stats_polling_interval_s = named("stats", interval)?;
            }
            _ => {
                return Err(format!(
                    "'{word}' is not one of deflate-on-oom, stats=SECONDS, hinting, reporting"
                ));
            }
        }
    }
    Ok(config)
}

/// `PATH[,ro][,root][,id=ID][,cache=writeback|unsafe][,io=sync|async][,overlay[=FILE|=memory]][,vhost-user][,bw=N][,ops=N][,group=ID]`
#[derive(Clone, Debug)]
pub(super) struct DiskArg {
    path: PathBuf,
    is_read_only: bool,
    pub(super) is_root: bool,
    is_unsafe: bool,
    is_vhost_user: bool,
    io_engine: block::IoEngine,
    overlay: Option<block::Place>,
    id: Option<String>,
    limits: LimitArgs,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut words = s.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or("want a path first")?;
        let mut disk = Self {
            path: path.into(),
            is_read_only: false,
            is_root: false,
            is_unsafe: false,
            is_vhost_user: false,
            io_engine: block::IoEngine::Sync,
            overlay: None,
            id: None,
            limits: LimitArgs::default(),
        };
        for word in options(words)? {
            if let Some(place) = overlay(word) {
                disk.overlay = Some(place);
                continue;
            }
            match word.split_once('=') {
                None if word == "ro" => disk.is_read_only = true,
                None if word == "rw" => disk.is_read_only = false,
                None if word == "root" => disk.is_root = true,
                None if word == "vhost-user" => disk.is_vhost_user = true,
                Some(("id", id)) => disk.id = Some(id.into()),
                Some(("cache", "writeback")) => disk.is_unsafe = false,
                Some(("cache", "unsafe")) => disk.is_unsafe = true,
                Some(("io", "sync")) => disk.io_engine = block::IoEngine::Sync,
                Some(("io", "async")) => disk.io_engine = block::IoEngine::Async,
                Some((key, value)) if disk.limits.take(key, value)? => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of ro, rw, root, id=ID, cache=writeback, cache=unsafe, \
                         io=sync, io=async, overlay, overlay=FILE, overlay=memory, vhost-user, bw=N, ops=N, group=ID"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// Where the layer of a disk goes, if the word is about that.
pub(super) fn overlay(word: &str) -> Option<block::Place> {
    match word.split_once('=') {
        None if word == "overlay" => Some(block::Place::Temporary),
        Some(("overlay", "memory")) => Some(block::Place::Memory),
        Some(("overlay", path)) if !path.is_empty() => Some(block::Place::File(path.into())),
        _ => None,
    }
}

impl DiskArg {
    pub(super) fn config(self, index: usize, is_root_device: bool) -> block::Config {
        let id = self.id.unwrap_or_else(|| format!("disk{index}"));
        let cache_type = match self.is_unsafe {
            true => block::CacheType::Unsafe,
            false => block::CacheType::Writeback,
        };
        let is_read_only = self.is_read_only;
        let mut config = block::Config {
            is_root_device,
            is_read_only,
            cache_type,
            rate_limiter: self.limits.limiter(),
            rate_limit_group: self.limits.group,
            io_engine: self.io_engine,
            overlay: self.overlay,
            ..block::Config::new(id, self.path)
        };
        if self.is_vhost_user {
            config.socket = config.path_on_host.take().map(|path| path.to_path_buf());
        }
        config
    }
}

/// `PATH[,ro][,root][,id=ID][,bw=N][,ops=N][,group=ID]`
#[derive(Clone, Debug)]
pub(super) struct PmemArg {
    path: PathBuf,
    is_read_only: bool,
    pub(super) is_root: bool,
    id: Option<String>,
    limits: LimitArgs,
}

impl FromStr for PmemArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut words = s.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or("want a path first")?;
        let mut pmem = Self {
            path: path.into(),
            is_read_only: false,
            is_root: false,
            id: None,
            limits: LimitArgs::default(),
        };
        for word in options(words)? {
            match word.split_once('=') {
                None if word == "ro" => pmem.is_read_only = true,
                None if word == "rw" => pmem.is_read_only = false,
                None if word == "root" => pmem.is_root = true,
                Some(("id", id)) => pmem.id = Some(id.into()),
                Some((key, value)) if pmem.limits.take(key, value)? => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of ro, rw, root, id=ID, bw=N, ops=N, group=ID"
                    ));
                }
            }
        }
        Ok(pmem)
    }
}

impl PmemArg {
    pub(super) fn config(self, index: usize) -> pmem::Config {
        let id = self.id.unwrap_or_else(|| format!("pmem{index}"));
        pmem::Config {
            root_device: self.is_root,
            read_only: self.is_read_only,
            rate_limiter: self.limits.limiter(),
            rate_limit_group: self.limits.group,
            ..pmem::Config::new(id, self.path)
        }
    }
}

/// `TOTAL[,slot=MIB][,block=MIB]`
#[derive(Clone, Debug)]
pub(super) struct HotplugArg(pub(super) mem::Config);

impl FromStr for HotplugArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mib = |word: &str| named("MiB", word);
        let mut words = s.split(',');
        let mut config = mem::Config::new(mib(words.next().unwrap_or_default())?);
        for word in options(words)? {
            match word.split_once('=') {
                Some(("slot", slot)) => config.slot_size_mib = mem::SlotSize(mib(slot)?),
                Some(("block", block)) => config.block_size_mib = mem::BlockSize(mib(block)?),
                _ => return Err(format!("'{word}' is not one of slot=MIB, block=MIB")),
            }
        }
        Ok(Self(config))
    }
}

/// How a device is told of the descriptor with this number.
pub(super) fn descriptor(number: &str) -> Result<String, String> {
    let parsed: u32 =
        number.parse().map_err(|_| format!("fd '{number}': want the number of a descriptor"))?;
    Ok(format!("{DESCRIPTOR}{parsed}"))
}

/// `tap=NAME[,mac=MAC][,mtu=N][,id=ID][,mmds[=V1|V2]]`, and limits with `rx-` or `tx-` before them
#[derive(Clone, Debug)]
pub(super) struct NetArg {
    tap: String,
    mac: Option<String>,
    mtu: Option<u16>,
    id: Option<String>,
    pub(super) mmds: Option<MmdsVersion>,
    rx: LimitArgs,
    tx: LimitArgs,
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut net = Self {
            tap: String::new(),
            mac: None,
            mtu: None,
            id: None,
            mmds: None,
            rx: LimitArgs::default(),
            tx: LimitArgs::default(),
        };
        for word in options(s.split(','))? {
            match word.split_once('=') {
                Some(("tap", tap)) => net.tap = tap.into(),
                Some(("fd", number)) => net.tap = descriptor(number)?,
                Some(("mac", mac)) => net.mac = Some(mac.into()),
                Some(("mtu", mtu)) => {
                    net.mtu = Some(named("mtu", mtu)?);
                }
                Some(("id", id)) => net.id = Some(id.into()),
                None if word == "mmds" => net.mmds = Some(MmdsVersion::V2),
                Some(("mmds", "V1")) => net.mmds = Some(MmdsVersion::V1),
                Some(("mmds", "V2")) => net.mmds = Some(MmdsVersion::V2),
                Some((key, value)) if net.take_limit(key, value)? => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of tap=, fd=, mac=, mtu=, id=, mmds, mmds=V1, mmds=V2, rx-bw=, rx-ops=, rx-group=, \
                         tx-bw=, tx-ops=, tx-group="
                    ));
                }
            }
        }
        if net.tap.is_empty() {
            return Err("want tap=NAME or fd=N".into());
        }
        Ok(net)
    }
}

impl NetArg {
    fn take_limit(&mut self, key: &str, value: &str) -> Result<bool, String> {
        match key.split_once('-') {
            Some(("rx", key)) => self.rx.take(key, value),
            Some(("tx", key)) => self.tx.take(key, value),
            _ => Ok(false),
        }
    }

    pub(super) fn config(self, index: usize) -> net::Config {
        let id = self.id.unwrap_or_else(|| format!("eth{index}"));
        net::Config {
            guest_mac: self.mac,
            mtu: self.mtu,
            rx_rate_limiter: self.rx.limiter(),
            tx_rate_limiter: self.tx.limiter(),
            rx_rate_limit_group: self.rx.group,
            tx_rate_limit_group: self.tx.group,
            ..net::Config::new(id, self.tap)
        }
    }
}

/// `cid=N,uds=PATH`
#[derive(Clone, Debug)]
pub(super) struct VsockArg {
    pub(super) cid: u32,
    pub(super) uds: PathBuf,
}

impl FromStr for VsockArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut cid, mut uds) = (None, None);
        for word in options(s.split(','))? {
            match word.split_once('=') {
                Some(("cid", n)) => cid = Some(named("cid", n)?),
                Some(("uds", path)) if !path.is_empty() => uds = Some(path.into()),
                _ => return Err(format!("'{word}' is not one of cid=N, uds=PATH")),
            }
        }
        let (Some(cid), Some(uds)) = (cid, uds) else { return Err("want cid=N,uds=PATH".into()) };
        Ok(Self { cid, uds })
    }
}
